"""The cache of images, and scripted generators."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from interleave.models.generators.cache import CachedGenerator
from interleave.models.generators.pipeline import GenerationSettings
from interleave.models.generators.scripted import ScriptedConfig, ScriptedGenerator
from interleave.protocols import BackendError, GenerationRequest, HashedImage

T = TypeVar("T")


class Counting(ScriptedGenerator):
    """Counts what it draws."""

    calls = 0

    async def generate(self, request: GenerationRequest) -> HashedImage:
        self.calls += 1
        return await super().generate(request)


def run(awaitable: Awaitable[T]) -> T:
    async def main() -> T:
        return await awaitable

    return asyncio.run(main())


def source(shade: int) -> HashedImage:
    return HashedImage.from_pil(Image.new("RGB", (4, 4), (shade, 0, 0)))


JOB = GenerationRequest("a red circle", (source(1),), 3)


def test_an_identical_job_is_never_generated_twice(tmp_path: Path) -> None:
    first = Counting()
    cached = CachedGenerator(first, tmp_path / "cache")
    picture = run(cached.generate(JOB))
    assert run(cached.generate(JOB)) == picture
    assert (first.calls, cached.hits, cached.misses) == (1, 1, 1)
    again = Counting()
    found = run(CachedGenerator(again, tmp_path / "cache").generate(JOB))
    assert again.calls == 0
    assert found.image.tobytes() == picture.image.tobytes()


@pytest.mark.parametrize(
    "other",
    [
        GenerationRequest("a red circle ", JOB.sources, 3),
        GenerationRequest("a red circle", (source(2),), 3),
        GenerationRequest("a red circle", (), 3),
        GenerationRequest("a red circle", (source(1), source(1)), 3),
        GenerationRequest("a red circle", JOB.sources, 4),
        GenerationRequest("half a pair \ud800", JOB.sources, 3),
    ],
)
def test_what_differs_is_generated(other: GenerationRequest, tmp_path: Path) -> None:
    inner = Counting(max_sources=2)
    cached = CachedGenerator(inner, tmp_path)
    run(cached.generate(JOB))
    run(cached.generate(other))
    assert inner.calls == 2


@settings(max_examples=30)
@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=3))
def test_keys_tell_generators_and_parameters_apart(params: dict[str, Any]) -> None:
    key = CachedGenerator(ScriptedGenerator(params=params), Path("unused")).key(JOB)
    assert key == CachedGenerator(ScriptedGenerator(params=dict(reversed(params.items()))), Path("unused")).key(JOB)
    assert key != CachedGenerator(ScriptedGenerator(params=params | {"more": 1}), Path("unused")).key(JOB)


def test_equal_jobs_at_the_same_time_share_one_image(tmp_path: Path) -> None:
    inner = Counting(latency=0.05)
    cached = CachedGenerator(inner, tmp_path)

    async def main() -> list[HashedImage]:
        return await asyncio.gather(*(cached.generate(JOB) for _ in range(20)))

    assert len({picture.id for picture in run(main())}) == 1
    assert (inner.calls, cached.hits, cached.misses) == (1, 19, 1)


class Held(ScriptedGenerator):
    """Begins, and goes on when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go, self.cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def generate(self, request: GenerationRequest) -> HashedImage:
        self.begun.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return await super().generate(request)


def test_one_cancelled_caller_does_not_take_the_image_from_another(tmp_path: Path) -> None:
    async def main() -> tuple[HashedImage | BaseException, ...]:
        inner = Held()
        cached = CachedGenerator(inner, tmp_path)
        tasks = [asyncio.create_task(cached.generate(JOB)) for _ in range(3)]
        await inner.begun.wait()
        tasks[0].cancel()
        await asyncio.sleep(0)
        inner.go.set()
        return tuple(await asyncio.gather(*tasks, return_exceptions=True))

    first, *others = run(main())
    assert isinstance(first, asyncio.CancelledError)
    assert all(isinstance(other, HashedImage) for other in others)


def test_what_no_caller_waits_for_is_cancelled_and_can_be_asked_again(tmp_path: Path) -> None:
    async def main() -> HashedImage:
        inner = Held()
        cached = CachedGenerator(inner, tmp_path)
        task = asyncio.create_task(cached.generate(JOB))
        await inner.begun.wait()
        task.cancel()
        inner.go.clear()
        again = asyncio.create_task(cached.generate(JOB))
        await inner.cancelled.wait()
        inner.go.set()
        return await again

    assert run(main()).id


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "gone", "key", "stray key"])
def test_what_is_damaged_is_generated_again(damage: str, tmp_path: Path) -> None:
    inner = Counting()
    cached = CachedGenerator(inner, tmp_path)
    picture = run(cached.generate(JOB))
    (file,), (key,) = tmp_path.rglob("*.png"), (path for path in tmp_path.rglob("keys/*/*"))
    match damage:
        case "cut":
            file.write_bytes(file.read_bytes()[:80])
        case "empty":
            file.write_bytes(b"")
        case "other":
            Image.new("RGB", (64, 64)).save(file)
        case "gone":
            file.unlink()
        case "key":
            key.write_bytes(b"\xff\x00")
        case "stray key":
            key.write_text("../../../etc/passwd")
    assert run(cached.generate(JOB)) == picture
    assert inner.calls == 2
    assert run(cached.generate(JOB)) == picture
    assert inner.calls == 2


def test_failures_are_not_kept(tmp_path: Path) -> None:
    failures = [BackendError("rate_limited", "later"), None]
    inner = Counting(fails=lambda request: failures.pop(0))
    cached = CachedGenerator(inner, tmp_path)
    with pytest.raises(BackendError, match="later"):
        run(cached.generate(JOB))
    assert run(cached.generate(JOB)).id


def test_an_image_is_not_lost_with_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(CachedGenerator(ScriptedGenerator(), tmp_path / "file").generate(JOB)).id
    said = capsys.readouterr().err
    assert f"{tmp_path / 'file' / 'images'}: cannot be written" in said
    assert "set cache: null" in said


def test_a_cache_passes_on_what_its_generator_is(tmp_path: Path) -> None:
    inner = ScriptedGenerator(max_sources=4, params={"a": 1})
    cached = CachedGenerator(inner, tmp_path)
    assert (cached.id, cached.params, cached.max_sources) == ("scripted", {"a": 1}, 4)
    run(cached.close())


def test_scripted_images_tell_their_jobs_apart() -> None:
    generator = ScriptedConfig(height=20, width=10).build()
    picture = run(generator.generate(JOB))
    assert picture.image.size == (10, 20)
    assert picture == run(generator.generate(JOB))
    assert picture != run(generator.generate(GenerationRequest(JOB.prompt, JOB.sources, 4)))
    wider = ScriptedGenerator().with_params(GenerationSettings(width=12, num_inference_steps=3))
    assert wider.params == {"width": 12, "num_inference_steps": 3}
    assert run(wider.generate(JOB)).image.size == (12, 64)
