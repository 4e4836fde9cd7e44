import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from imgen_common.errors import UserError
from imgen_common.images import content_hash
from interleave.protocols import HashedImage
from interleave.records import Attempt, GeneratorInfo, Plan, PlannerRecord, PlanRecord, PlanStep, Request, Trajectory
from interleave.storage.images import ImageStore
from interleave.storage.trace import TRACE, Trace, TraceEntry, read_trace


@pytest.fixture(autouse=True, scope="module")
def unsynced() -> Iterator[None]:
    """Waiting for the disk a thousand times is slow, and no test here cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def noise(seed: int, width: int = 5, height: int = 4) -> HashedImage:
    return HashedImage.from_pil(
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    )


# --- images --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9))
def test_an_image_comes_back_by_its_pixels(
    tmp_path_factory: pytest.TempPathFactory, seed: int, width: int, height: int
) -> None:
    store, picture = ImageStore(tmp_path_factory.mktemp("p")), noise(seed, width, height)
    assert picture.id not in store
    assert store.put(picture) == store.put(picture) == picture.id
    assert picture.id in store
    assert store.get(picture.id).image.tobytes() == picture.image.tobytes()


def test_it_lies_in_folders_of_two_levels_and_nothing_else_does(tmp_path: Path) -> None:
    name = ImageStore(tmp_path).put(noise(0))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / name[:2] / name[2:4] / f"{name}.png"]


def test_only_pixels_are_stored(tmp_path: Path) -> None:
    image = noise(1).image
    colour = image.getpixel((0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.info |= {"transparency": colour, "exif": exif.tobytes(), "icc_profile": b"none"}
    picture = HashedImage(image, content_hash(image))
    store = ImageStore(tmp_path)
    store.put(picture)
    assert store.get(picture.id).image.tobytes() == image.tobytes()


def test_an_image_under_a_wrong_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other pixels"):
        ImageStore(tmp_path).put(HashedImage(noise(0).image, noise(1).id))


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n", "a" * 65])
def test_what_is_no_id_leads_nowhere(tmp_path: Path, name: str) -> None:
    store = ImageStore(tmp_path)
    for ask in (store.get, store.path, store.__contains__):
        with pytest.raises(UserError, match="not the id of an image"):
            ask(name)


def test_a_missing_or_changed_image_is_named(tmp_path: Path) -> None:
    store, picture, other = ImageStore(tmp_path), noise(0), noise(1)
    with pytest.raises(UserError, match="no such image"):
        store.get(picture.id)
    with pytest.raises(UserError, match="no such image"):
        store.copy(picture.id, tmp_path / "copy.png")
    for image in (picture, other):
        store.put(image)
    store.path(picture.id).write_bytes(store.path(other.id).read_bytes())
    with pytest.raises(UserError, match="its pixels are not those"):
        store.get(picture.id)
    store.path(picture.id).write_bytes(b"rubbish")
    with pytest.raises(UserError, match="not an image"):
        store.get(picture.id)


def test_many_threads_may_store_the_same_images(tmp_path: Path) -> None:
    store, images = ImageStore(tmp_path), [noise(seed) for seed in range(8)]
    threads = [threading.Thread(target=lambda: [store.put(image) for image in images]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.get(image.id).image.tobytes() for image in images] == [image.image.tobytes() for image in images]
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 8


# --- trace -----------------------------------------------------------------------------------------------------------


def attempt(number: int = 1, story: str = "a", prompt: str = "a cat") -> Attempt:
    return Attempt(
        trajectory_id=story,
        step=1,
        attempt=number,
        op="t2i",
        original_prompt=prompt,
        prompt_used=prompt,
        seed=7,
        generator=GeneratorInfo(id="g", params={"steps": 4, "scale": 1.0}),
        timings={"generate": 0.1},
        status="unjudged",
    )


def plan_record(story: str = "a") -> PlanRecord:
    plan = Plan(steps=(PlanStep(index=1, prompt="a cat"), PlanStep(index=2, text="end")), reasoning="r")
    planner = PlannerRecord(model="m", template="t", template_hash="h")
    return PlanRecord(trajectory_id=story, request=Request(id=story, text="x"), planner=planner, plan=plan)


def trajectory(story: str = "a") -> Trajectory:
    planned = plan_record(story)
    return Trajectory(
        id=story, request=planned.request, planner=None, plan=planned.plan, selected={1: 2}, status="complete"
    )


def test_records_come_back_by_trajectory(tmp_path: Path) -> None:
    with Trace(tmp_path / "new" / "run") as trace:
        assert trace.read() == {}
        written = [plan_record("a"), plan_record("b"), attempt(1), attempt(2), attempt(1, "b"), trajectory("a")]
        for record in written:
            trace.append(record)
        expected = {
            "a": TraceEntry(plan_record("a"), {(1, 1): attempt(1), (1, 2): attempt(2)}, trajectory("a")),
            "b": TraceEntry(plan_record("b"), {(1, 1): attempt(1, "b")}),
        }
        assert trace.read() == expected
    assert read_trace(tmp_path / "new" / "run") == expected


def test_of_two_records_of_one_thing_the_later_counts(tmp_path: Path) -> None:
    with Trace(tmp_path) as trace:
        for prompt in ("first", "second"):
            trace.append(attempt(prompt=prompt))
    assert read_trace(tmp_path)["a"].attempts == {(1, 1): attempt(prompt="second")}


def test_what_followed_a_record_that_is_replaced_is_set_apart(tmp_path: Path) -> None:
    with Trace(tmp_path) as trace:
        for record in (attempt(1), attempt(2), attempt(3), attempt(2, prompt="again")):
            trace.append(record)
    entry = read_trace(tmp_path)["a"]
    assert entry.attempts == {(1, 1): attempt(1), (1, 2): attempt(2, prompt="again")}
    assert entry.replaced == [attempt(2), attempt(3)]


def test_a_folder_without_a_trace_holds_no_records(tmp_path: Path) -> None:
    assert read_trace(tmp_path) == {}


@given(st.text(st.characters(), max_size=30))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    record = attempt(prompt=text + "\ud800\u2028\x85\r\n\0\U0001f600")
    folder = tmp_path_factory.mktemp("t")
    with Trace(folder) as trace:
        trace.append(record)
    assert read_trace(folder)["a"].attempts == {(1, 1): record}
    assert (folder / TRACE).read_bytes().count(b"\n") == 1
    (folder / TRACE).read_text(encoding="utf-8")


def test_a_last_line_torn_at_any_byte_is_cut_off(tmp_path: Path) -> None:
    with Trace(tmp_path) as trace:
        trace.append(attempt(1))
        whole = (tmp_path / TRACE).read_bytes()
        trace.append(attempt(2, prompt="ein Käse\n"))
    both = (tmp_path / TRACE).read_bytes()
    for length in range(len(whole), len(both)):
        for tail in (b"", b"\0\0"):
            (tmp_path / TRACE).write_bytes(both[:length] + tail)
            assert read_trace(tmp_path)["a"].attempts.keys() == {(1, 1)}
            if length % 20:  # it is cut off the same way wherever it ends
                continue
            with Trace(tmp_path) as trace:
                assert (tmp_path / TRACE).read_bytes() == whole
                trace.append(attempt(3))
            assert read_trace(tmp_path)["a"].attempts.keys() == {(1, 1), (1, 3)}


PROCESS = """
import resource, signal, sys
from pathlib import Path
from imgen_common.errors import UserError
from interleave.records import Attempt, GeneratorInfo
from interleave.storage.trace import Trace

def attempt(number):
    about = {"original_prompt": "long " * 2000, "prompt_used": "", "generator": GeneratorInfo(id="g")}
    return Attempt(trajectory_id="a", step=1, attempt=number, op="t2i", seed=7, status="unjudged", **about)

trace = Trace(Path(sys.argv[1]))
"""
KILLED = """
number = 0
while True:
    number += 1
    trace.append(attempt(number))
    print(number, flush=True)
"""
LIMITED = """
trace.append(attempt(1))
size = trace.path.stat().st_size
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for more in (0, 1, 5000, 10000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + more, resource.RLIM_INFINITY))
    try:
        trace.append(attempt(2))
    except UserError as error:
        print(error)
    assert trace.path.stat().st_size == size
"""


def test_what_was_appended_before_a_kill_is_there(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS + KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        seen = [int(writer.stdout.readline()) for _ in range(20)]
        with pytest.raises(UserError, match="in use by another run"):
            Trace(tmp_path)
        assert len(read_trace(tmp_path)["a"].attempts) >= 20  # a reader is not in the way
        writer.send_signal(signal.SIGKILL)
        seen += [int(line) for line in writer.stdout if line.endswith("\n")]
    with Trace(tmp_path) as trace:  # the system gave the lock back
        found = sorted(number for _, number in trace.read()["a"].attempts)
    assert found[: len(seen)] == seen
    assert len(found) <= len(seen) + 1


def test_a_record_written_in_part_is_taken_back(tmp_path: Path) -> None:
    """A real limit of the system, which lets the first bytes of the line through."""
    command = [sys.executable, "-c", PROCESS + LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("cannot be written (File too large)") == 4
    assert read_trace(tmp_path)["a"].attempts.keys() == {(1, 1)}


def test_a_second_writer_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    first = Trace(tmp_path)
    with pytest.raises(UserError, match="in use by another run; wait"):
        Trace(tmp_path)
    first.close()
    Trace(tmp_path).close()


def test_threads_may_share_a_trace(tmp_path: Path) -> None:
    with Trace(tmp_path) as trace:
        threads = [
            threading.Thread(target=lambda n=n: [trace.append(attempt(10 * n + i + 1)) for i in range(10)])
            for n in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {number for _, number in read_trace(tmp_path)["a"].attempts} == set(range(1, 51))


def as_line(**changes: object) -> str:
    return json.dumps({"type": "attempt", **attempt().model_dump(mode="json"), **changes})


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[]", "{}", '{"type": "other"}', '{"type": "attempt", "step": 1}', "\0\0", "", "3", "[" * 100_000),
        *('{"type": {}}', '{"type": []}', '{"type": null}', '{"type": "trajectory", "spent": {"seconds": "1"}}'),
        *(as_line(timings={"generate": seconds}) for seconds in (float("inf"), float("nan"), -1.0, 1e300, "soon")),
        *(as_line(step=0), as_line(step=1.5), as_line(generator=3), as_line(scores={"semantics": 1e999})),
        as_line()[:-5] + "1" * 5000,
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    with Trace(tmp_path) as trace:
        trace.append(attempt())
    with (tmp_path / TRACE).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=r"trace\.jsonl:2: damaged record"):
        read_trace(tmp_path)


# --- full disk -------------------------------------------------------------------------------------------------------


def full_disk(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_records_before_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Trace(tmp_path) as trace:
        trace.append(attempt(1))
        before = (tmp_path / TRACE).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full_disk)
            with pytest.raises(UserError, match="the disk is full; make room and run the command again"):
                trace.append(attempt(2))
        assert (tmp_path / TRACE).read_bytes() == before
        trace.append(attempt(3))
    assert read_trace(tmp_path)["a"].attempts.keys() == {(1, 1), (1, 3)}


def test_an_image_on_a_full_disk_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ImageStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(UserError, match="the disk is full"):
            store.put(noise(0))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    store.put(noise(0))
    assert store.get(noise(0).id) == noise(0)


@pytest.mark.parametrize("make", [lambda path: Trace(path), lambda path: ImageStore(path).put(noise(0))])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, make: Callable[[Path], object]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        make(tmp_path / "file" / "run")


def test_a_run_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    assert read_trace(tmp_path) == {}
    (tmp_path / "trace.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="made by an earlier version of interleave"):
        read_trace(tmp_path)
