"""Parts of one batch or build that several machines share, and one folder of all parts."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from imgen_common.config import read_yaml
from imgen_common.errors import UserError
from imgen_common.files import atomic_folder, read_text, whole_lines, write_atomic
from imgen_common.run_folder.data import DataHash, record_data, recorded_data
from imgen_common.run_folder.find import CONFIG
from interleave.loop.requests import REQUESTS, load_requests, save_requests
from interleave.models.remote import HOW_REACHED
from interleave.storage.images import IMAGES
from interleave.storage.trace import TRACE

Part = TypeVar("Part")
OF_MACHINES = {
    *("shard", "budget", "cache", "path", *HOW_REACHED),
    *("max_generations", "max_seconds", "max_unscored", "prices", "confirm_calls", "confirm_money"),
}
"""Keys that may differ between the parts; hashes say whether the files at two paths are equal."""
PNG_END = b"IEND\xaeB`\x82"
PART = "shard.txt"
"""Where a part of a batch says which it is, as `2/8`; that of a build says it in its configuration."""


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`: every count-th item."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`2/8`.  Raises UserError."""
        number, _, count = text.partition("/")
        if not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit()) or len(text) > 11:
            raise UserError(f"--shard {text}: must be like 2/8, the second of eight parts")
        if not 1 <= int(number) <= int(count):
            raise UserError(f"--shard {text}: the parts of {count} are 1 to {count}")
        return cls(int(number), int(count))

    @property
    def part(self) -> str:
        """What its files are named by; empty where it is all."""
        return f"{self.number}-of-{self.count}" if self.count > 1 else ""

    def record(self, run: Path) -> None:
        """Keeps in a run folder which part it is, for `merge_shards`."""
        if self.count > 1:
            write_atomic(run / PART, f"{self.number}/{self.count}\n")

    def of(self, items: Sequence[Part]) -> list[Part]:
        """Its items.  Raises UserError where there are more parts than items."""
        if self.count > max(1, len(items)):
            raise UserError(f"--shard {self.number}/{self.count}: there are only {len(items)} items")
        return list(items[self.number - 1 :: self.count])


ALL = Shard()


def merge_shards(shards: Sequence[Path], out: Path) -> int:
    """Makes one folder, as if one machine had done all, of the folders of all parts; the number of requests.

    Folders that do not say which part they are, as of earlier versions, are taken in the order in which they are given.
    Records, images and answers of judges are copied; what is made of them (sets, pages) is made anew by resuming.
    Raises UserError unless all are folders of one batch or one build, made with the same models and templates, with
    requests that differ, where a part is not among them, an image is cut short, or if `out` exists.
    """
    config, data = _read_config(shards[0]), recorded_data(shards[0])
    for shard in shards[1:]:
        if differing := what_differs(config, data, shard):
            raise UserError(f"{shard}: another {differing} than {shards[0]}; merge parts of one")
    shards = sorted(shards, key=lambda shard: _part(shard).number)
    rounds = zip_longest(*(load_requests(shard) for shard in shards))
    requests = [request for each in rounds for request in each if request is not None]
    ids = [request.id for request in requests]
    if twice := next((one for one, count in Counter(ids).items() if count > 1), None):
        raise UserError(f"request {twice!r} is in two of the folders; give every part once")
    _check_whole(shards)
    with atomic_folder(out) as fresh:
        text = (shards[0] / CONFIG).read_text(encoding="utf-8")
        (fresh / CONFIG).write_text(re.sub(r"(?m)^shard:.*$", "shard: 1/1", text), encoding="utf-8")
        save_requests(requests, fresh)
        if data:
            record_data(fresh, data)
        with (fresh / TRACE).open("wb") as trace:
            for shard in shards:
                trace.writelines(whole_lines(shard / TRACE) if (shard / TRACE).is_file() else ())
        for shard in shards:
            _copy_rest(shard, fresh)
    return len(requests)


def what_differs(config: Mapping[str, Any], data: Mapping[str, DataHash], other: Path) -> str:
    """Keys of the configuration, or else models, templates and requests, with which the folder `other` was made
    otherwise; empty: nothing differs but what is of one machine."""
    config, theirs, recorded = _without(config), _read_config(other), recorded_data(other)
    if keys := sorted(key for key in {*config, *theirs} if config.get(key) != theirs.get(key)):
        return f"configuration in {', '.join(keys)}"
    return ", ".join(key for key, hashed in data.items() if recorded.get(key, hashed) != hashed)


def _read_config(shard: Path) -> dict[str, Any]:
    if not ((shard / CONFIG).is_file() and (shard / REQUESTS).is_file()):
        raise UserError(f"{shard}: no {CONFIG} or no {REQUESTS} in it; give the folders of a batch or of data build")
    return _without(read_yaml(shard / CONFIG))


def _part(shard: Path) -> Shard:
    """Which part a folder says it is; all where it says none."""
    file = shard / PART
    return Shard.parse(read_text(file).strip() if file.is_file() else read_yaml(shard / CONFIG).get("shard") or "1/1")


def _check_whole(shards: Sequence[Path]) -> None:
    """Raises UserError where folders say which parts they are, and are not all parts of one."""
    parts = [_part(shard) for shard in shards]
    count = max(part.count for part in parts)
    if count > 1 and parts != [Shard(number, count) for number in range(1, count + 1)]:
        given = ", ".join(f"{shard} is {part.number}/{part.count}" for shard, part in zip(shards, parts, strict=True))
        raise UserError(f"{given}; give all {count} parts of one batch or build, and nothing else")


def _without(tree: Any) -> Any:
    """A configuration without what is of one machine."""
    return {k: _without(v) for k, v in tree.items() if k not in OF_MACHINES} if isinstance(tree, dict) else tree


def _copy_rest(shard: Path, out: Path) -> None:
    """Copies images, and appends the answers of judges.  Raises UserError for an image that was copied in part."""
    for file in sorted((shard / IMAGES).rglob("*.png")):
        target = out / file.relative_to(shard)
        content = file.read_bytes()
        if not content.endswith(PNG_END):
            raise UserError(f"{file}: the image is cut short; copy its part of the batch again")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    for file in sorted((shard / "scores").rglob("*.jsonl")):
        target = out / file.relative_to(shard)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as answers:
            answers.writelines(whole_lines(file))
