"""Golden values recorded before the code was rearranged, and the comparison with what it computes now.

On the machine that recorded them (same processor, Python and torch) every bit must be equal.  Elsewhere kernels round
differently: digests are left out there, and numbers must agree to 1e-3 of their size.  `PARITY_RECORD=1` records.
The gradients of the tiny SD3, FLUX.1 and FLUX.2 were recorded again when rewards began to cut off what the filter of a
resize overshoots: their images have another size than the reward's; those of FLUX.2 once more for another tiny model,
after the code had given the same bits for the former one.  The estimates and what is said of a set were recorded again
when they had gained parts; families and keys that came later were never recorded.
"""

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
TOLERANCE = 1e-3
SKIPPED = ("style", "svg", "pre", "script")
RENAMED: dict[str, dict[str, str]] = {
    "training": {
        "train/lr": "train/learning_rate",
        "colours": "colors",
        "watch/colours": "watch/colors",
        "average": "ema",
    },
    "sft": {
        "passing": "activation",
        "cache": "kv_cache",
        "total": "static",
        "num_weights": "num_parameters",
        "num_trained": "num_trainable",
    },
    "grpo": {
        "passing": "activation",
        "cache": "kv_cache",
        "total": "static",
        "num_weights": "num_parameters",
        "num_trained": "num_trainable",
        "pictures": "images",
        "judgements": "judgments",
        "scoring/pictures": "scoring/images",
        "scoring/pictures_from_cache": "scoring/images_from_cache",
        "scoring/judgements": "scoring/judgments",
        "scoring/judgements_from_cache": "scoring/judgments_from_cache",
        "rewards/semantic/mean": "rewards/semantics/mean",
        "rewards/semantic/std": "rewards/semantics/std",
    },
}
"""Names that were changed on purpose since the recording, by the first word of a golden's name: keys, and strings that
are such a name."""
STORY = {"error_kind", "finish_reason", "revised_prompt", "texts", "max_sequence_length"}
ADDED = {
    "story": STORY,
    "batch": STORY,
    "sft": {"lora_layers"},
    "grpo": {"lora_layers"},
}
"""Keys that records have gained since the recording, by the first word of a golden's name."""
VOLATILE = re.compile(
    r"(seconds\w*|tflops|mfu|duration|timings|time|peak_memory\w*|wall|started|created|host|path|report|run|command|version)$"
)


def fingerprint(tensors: Mapping[str, Tensor] | Tensor) -> dict[str, Any]:
    """A digest of every bit, and numbers that survive another order of summation: norm, sum and one projection."""
    named = {"": tensors} if isinstance(tensors, Tensor) else tensors
    digest = hashlib.sha256()
    total = {"norm": 0.0, "sum": 0.0, "projection": 0.0, "count": 0}
    for name in sorted(named):
        value = named[name].detach().cpu().contiguous()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
        flat = value.double().flatten()
        ramp = torch.cos(torch.arange(flat.numel(), dtype=torch.float64))
        total["norm"] += float(flat @ flat)
        total["sum"] += float(flat.sum())
        total["projection"] += float(flat @ ramp)
        total["count"] += flat.numel()
    return {"sha256": digest.hexdigest(), **total}


def digest(data: bytes | str) -> dict[str, str]:
    """A digest of every byte."""
    return {"sha256": hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()}


def stable(value: Any) -> Any:
    """Plain data without what differs from run to run: times, memory, places and digests of places."""
    if isinstance(value, Mapping):
        kept = {str(k): v for k, v in value.items() if not VOLATILE.search(str(k))}
        return {k: stable(v) for k, v in kept.items() if not (k == "weights" and isinstance(v, str))}
    return [stable(item) for item in value] if isinstance(value, list | tuple) else value


class _Text(HTMLParser):
    """The text of a page outside of style sheets, figures and listings, up to the section about its environment."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._inside: list[str] = []
        self._ended = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SKIPPED:
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            self._inside.remove(tag)

    def handle_data(self, data: str) -> None:
        self._ended = self._ended or "environment" in data.lower()
        if not self._inside and not self._ended:
            self.parts.append(data)


def page(html: str) -> dict[str, Any]:
    """The numbers that a page shows, in their order, and a digest of every image in it."""
    text = _Text()
    text.feed(html)
    images = [digest(source) for source in re.findall(r'src="(data:image[^"]*)"', html)]
    return {"numbers": numbers("\n".join(text.parts)), "images": images}


def numbers(text: str) -> list[str]:
    """The numbers in the words of a terminal or a page, in their order, without times, dates and sizes of memory.

    Words may become better ones; what they say of the run must stay.
    """
    text = re.sub(r"(?:/[\w.+-]+){2,}|10⁹ bytes|\b[0-9a-f]{8,}\b", "", text)
    text = re.sub(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?\S*", "", text)
    text = re.sub(r"\b\d+(\.\d+)?\s(seconds?|s|ms|min|h|MB|GB|MiB|GiB|kB|bytes)\b(\s\d+\s(s|min))?", "", text)
    return re.findall(r"(?<![\w/.])[+\-\u2212]?\d[\d.,]*\d|(?<![\w/.])[+\-\u2212]?\d(?!\w)", text)


def check(name: str, value: Any, file: str) -> None:
    """Compares `value` with what golden/FILE.json holds under `name`.  A value that was never recorded is an error."""
    path = FOLDER / f"{file}.json"
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": machine(), "values": {}}
    value = json.loads(json.dumps(value))
    if os.environ.get("PARITY_RECORD"):
        assert held["machine"] == machine(), "recorded on another machine: remove the file and record everything anew"
        held["values"][name] = value
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(held, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    assert name in held["values"], f"{name} was never recorded"
    kind = name.split()[0]
    differences = list(
        _differences(
            _renamed(held["values"][name], RENAMED.get(kind, {})),
            _without(value, ADDED.get(kind, set())),
            name,
            exact=held["machine"] == machine(),
        )
    )
    assert not differences, "\n".join(differences[:20])


def machine() -> dict[str, str]:
    """What bits depend on."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    processor = models[0] if models else platform.processor()
    return {"processor": processor, "python": platform.python_version(), "torch": torch.__version__}


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def _without(value: Any, added: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, added) for key, item in value.items() if key not in added}
    return [_without(item, added) for item in value] if isinstance(value, list) else value


def _differences(old: Any, new: Any, place: str, *, exact: bool) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = [f"{place}.{key}: only before" for key in old.keys() - new.keys()]
        found += [f"{place}.{key}: only now" for key in new.keys() - old.keys()]
        both = sorted(old.keys() & new.keys())
        return found + [d for key in both for d in _differences(old[key], new[key], f"{place}.{key}", exact=exact)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            d
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            for d in _differences(a, b, f"{place}[{i}]", exact=exact)
        ]
    if old == new or (not exact and _close(old, new)):
        return []
    return [f"{place}: {old!r} before, {new!r} now"]


def _close(old: Any, new: Any) -> bool:
    if isinstance(old, str) and isinstance(new, str):
        return bool(re.fullmatch(r"[0-9a-f]{64}", old) and re.fullmatch(r"[0-9a-f]{64}", new))
    numbers = isinstance(old, int | float) and isinstance(new, int | float)
    return numbers and math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=1e-6)
