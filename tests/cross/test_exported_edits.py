"""Edits that stories asked for, as the generator's training reads them."""

from pathlib import Path

import pytest
from PIL import Image

from flowbp.data.edits import sources_of
from flowbp.data.prompts import load_prompts
from imgen_common.errors import UserError
from interleave.datasets.formats.edits import export_edits
from interleave.protocols import HashedImage
from interleave.records import Attempt, GeneratorInfo
from interleave.storage.images import IMAGES, ImageStore
from interleave.storage.trace import Trace

RED, BLUE = (HashedImage.from_pil(Image.new("RGB", (8, 6), color)) for color in ("red", "blue"))


def attempt(story: str, step: int, number: int, prompt: str, *sources: HashedImage) -> Attempt:
    return Attempt(
        trajectory_id=story,
        step=step,
        attempt=number,
        op="edit" if sources else "t2i",
        source_ids=tuple(source.id for source in sources),
        original_prompt=prompt,
        prompt_used=f"{prompt}, please",
        seed=0,
        generator=GeneratorInfo(id="g"),
        status="accepted",
    )


def run_with(folder: Path, *attempts: Attempt) -> Path:
    images = ImageStore(folder / IMAGES)
    for image in (RED, BLUE):
        images.put(image)
    with Trace(folder) as trace:
        for one in attempts:
            trace.append(one)
    return folder


def test_edits_of_stories_become_rows_that_a_training_reads(tmp_path: Path) -> None:
    run = run_with(
        tmp_path / "run",
        attempt("a", 1, 1, "a red circle"),
        attempt("a", 2, 1, "make the circle\n blue é", RED),
        attempt("a", 2, 2, "make the circle\n blue é", BLUE),
        attempt("b", 2, 1, "make the circle\n blue é", RED),
        attempt("b", 3, 1, "join them", RED, BLUE),
    )
    assert export_edits(run, tmp_path / "edits") == 2
    found = load_prompts(str(tmp_path / "edits" / "edits.jsonl"))
    assert found == ["make the circle\n blue é", "join them"]
    assert [[one.digest for one in sources_of(prompt)] for prompt in found] == [[RED.id], [RED.id, BLUE.id]]
    with pytest.raises(UserError, match="edits: exists already"):
        export_edits(run, tmp_path / "edits")


def test_without_edits_there_is_nothing_to_export(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", attempt("a", 1, 1, "a red circle"))
    with pytest.raises(UserError, match="no step of its plans is an edit"):
        export_edits(run, tmp_path / "edits")
    assert not (tmp_path / "edits").exists()
    with pytest.raises(UserError, match=r"no trace\.jsonl in it; give the folder of a run"):
        export_edits(tmp_path, tmp_path / "edits")
