"""The miniature's edition of every benchmark: official files whose items are of the shapes world.

What is asked for can be read by the verifier (`shapes_judge`), so that a whole benchmark runs on a CPU.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from imgen_common.files import atomic_folder
from imgen_common.shapes.render import draw
from imgen_common.shapes.scene import Spec, specs
from imgen_common.shapes.steps import Change, Draw, Story
from imgen_common.shapes.stories import sample_change, sample_story
from imgen_common.streams import numpy_generator
from interleave.benchmarks.official.rise_rules import CATEGORIES
from interleave.benchmarks.official.ueval import TASKS
from interleave.benchmarks.official.wise import NAMES, PARTS, WiseLegacy, WiseVerified

UEVAL = "items.json"
COUNT = 24
"""Items of an edition; of WISE, whose official sets have 1,000, as many are used."""


def write_data(name: str, folder: Path) -> Path:
    """Writes the edition of a benchmark, the same one every time, unless it is there; returns its path.

    Raises UserError if it cannot be written.
    """
    if not folder.exists():
        with atomic_folder(folder) as fresh:
            WRITERS[name](fresh, numpy_generator(0, f"benchmark-{name}"))
    return folder / UEVAL if name == "ueval" else folder


def _write_json(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _ueval(folder: Path, rng: np.random.Generator) -> None:
    """Stories; what each step's image shows, and what the words name."""
    items = []
    for number in range(COUNT):
        story = sample_story(rng, "test", num_steps=1 + number % 3)
        images = [
            f"Image {step} shows a {thing}."
            for step, made in enumerate(story.steps, 1)
            for thing in dict.fromkeys(made.after)
        ]
        item = {"id": f"shapes{number:02d}", "prompt": story.request, "task": TASKS[number % len(TASKS)]}
        items.append(item | {"text_rubrics": _told(story), "image_rubrics": images})
    _write_json(folder / UEVAL, items)


def _told(story: Story) -> list[str]:
    named = [
        thing.shape
        for step in story.steps
        for thing in (step.spec.things if isinstance(step, Draw) else (step.result,))
    ]
    return [f"The text names a {shape}." for shape in dict.fromkeys(named)]


def _wise_rows(edition: type[WiseVerified] | type[WiseLegacy], rng: np.random.Generator) -> list[dict[str, object]]:
    """Images that are named by facts, such as the color of a canary."""
    rows: list[dict[str, object]] = []
    for category, size in zip(NAMES, edition.sizes, strict=True):
        for _ in range(size):
            story = sample_story(rng, "test", num_steps=1, riddle=True)
            meant = f"The image shows {story.prompts[0]}."
            row: dict[str, object] = {
                "Prompt": story.request,
                "Explanation": meant,
                "Category": category,
                "Subcategory": "shapes",
            }
            rows.append(row | {"prompt_id": len(rows) + 1})
    return rows


def _wise(folder: Path, rng: np.random.Generator) -> None:
    _write_json(folder / "merge.json", _wise_rows(WiseVerified, rng))


def _wise_legacy(folder: Path, rng: np.random.Generator) -> None:
    rows = _wise_rows(WiseLegacy, rng)
    for name, first, end in zip(PARTS, (0, 400, 700), (400, 700, 1000), strict=True):
        _write_json(folder / f"{name}.json", rows[first:end])


def _rise(folder: Path, rng: np.random.Generator) -> None:
    """Edits of an image with two things; what it shows then."""
    options = specs("two", "test")
    items: list[dict[str, object]] = []
    while len(items) < COUNT:
        spec = options[rng.integers(len(options))]
        change = sample_change(spec.things, rng, "test")
        if change is None:
            continue
        category, index = CATEGORIES[len(items) % len(CATEGORIES)], f"{len(items):02d}"
        _render(spec, rng).save(folder / f"{index}.png")
        item: dict[str, object] = {
            "index": index,
            "category": category,
            "instruction": change.prompt,
            "image": f"{index}.png",
        }
        items.append(item | _reference(change, category, folder, index, rng))
    _write_json(folder / "data_total.json", items)


def _reference(change: Change, category: str, folder: Path, index: str, rng: np.random.Generator) -> dict[str, object]:
    words = "The image shows " + " and ".join(f"a {thing}" for thing in change.after) + "."
    if category != "logical_reasoning":
        return {"reference": words}
    if int(index) % 8 < 4 or len(change.after) > 2:
        return {"reference_txt": words}
    _render(Spec("two" if len(change.after) == 2 else "single", change.after), rng).save(folder / f"{index}_answer.png")
    return {"reference_img": f"{index}_answer.png"}


def _render(spec: Spec, rng: np.random.Generator) -> Image.Image:
    pixels = draw([spec], rng)[0]
    return Image.fromarray((pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8))


def _comm(folder: Path, rng: np.random.Generator) -> None:
    """Task 4, a story about a request: the built-in planner reads no images, as the other tasks have them."""
    for number in range(COUNT):
        story = sample_story(rng, "test", num_steps=2 + number % 2)
        row = {"model_input": story.request, "input_image_list": [], "output_gt_image_list": []}
        _write_json(folder / f"shapes{number:02d}_task4" / "results.json", row)


WRITERS: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "ueval": _ueval,
    "wise": _wise,
    "wise_legacy": _wise_legacy,
    "rise": _rise,
    "comm": _comm,
}
