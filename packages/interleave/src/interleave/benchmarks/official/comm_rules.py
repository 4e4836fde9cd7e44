"""CoMM's rules: how its scorer reads a story and shows it to a judge, and what the judge's answers are worth.

It reads a story from one text, `(1) Chop. <IMAGE> (2) Fry. <IMAGE>`, and a list of images, of which it shows ten.  What
comes before the first number is not read, the signs `<`, `[` and `]` are lost, and steps are numbered anew.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from imgen_common.errors import HALF_PAIR
from imgen_common.judging.questions import Message, Unreadable
from interleave.benchmarks.base import Content, Item, Scores
from interleave.benchmarks.official.files import read_image, through_jpeg

MARK = "<IMAGE>"
MAX_IMAGES = 10
MAX_SIDE = 512
NUMBER = re.compile(r"\(\d+\)")
FIRST_NUMBER = re.compile(r"\(\d+\)\s")
PIECE = re.compile(r"\[img\].*?\[/img\]|\[imgblock\].*?\[/imgblock\]|<IMAGE>|[^\[\]<]+")
"""What the scorer takes out of a step; it also knows the tags in which some models write images."""
LEFT_OUT = ("IMG0", "IMG1", "IMGB", "[imgblock]")
OPEN_TAG = "\0"
"""Stands for the bracket of a tag without an end while marks are set."""
Steps = list[Content]
"""Of each step its number, `(1)`, then its texts and images."""
COHERENCE, DESCRIPTIONS = "document_completeness_image_coherence", "texts_to_image_descriptions"
MATCH, TASK_1 = "descriptions_gt_images_consistency", "task_1"
MENTIONED = {
    **dict.fromkeys((COHERENCE, f"{COHERENCE}_task2"), "Image_Coherence"),
    **dict.fromkeys((DESCRIPTIONS, f"{DESCRIPTIONS}_task2"), "Content of Image"),
    MATCH: "Consistency",
    TASK_1: "Text Fidelity to Image",
}
"""The prompts by the authors' names, each a whole system turn; and a key of the answer for which it must ask."""
OVERALL = ("scores", "Image_Coherence", "overall_score")
FIELDS = {
    "style": (*OVERALL, "style_consistency"),
    "entity": (*OVERALL, "entity_consistency"),
    "trend": (*OVERALL, "trend_consistency"),
    "completeness": ("scores", "Completeness", "Score"),
    "image_quality": ("scores", "Image_Quality", "Score"),
    "irs": ("Consistency", "overall_score"),
    "overall_consistency": (*OVERALL, "overall_consistency"),
}
"""Where the numbers of tasks 2 to 4 stand in answers; `irs` is "text fidelity to images" there, from 0 to 10 as all."""
TEXT_FIELDS = {"completeness": ("Completeness", "Score"), "text_fidelity": ("Text Fidelity to Image", "overall_score")}
"""Those of task 1, where either of the last keys may stand for the other."""
SAME = {"Score": "overall_score", "overall_score": "Score"}
TABLE_TASKS = ("task 3", "task 4")
"""Those of published tables."""
NOT_APPLICABLE = "NA"


def step_texts(text: str) -> Iterator[str]:
    """The texts between numbers with a space behind them: `(2 cups)` and `(2)cups` begin no step, `(2) ` always does.

    As re.findall(r"\\(\\d+\\)\\s(.*?)\\s*(?=\\(\\d+\\)|$)", text, re.DOTALL), whose time is quadratic.
    """
    numbers = list(NUMBER.finditer(text))
    for place, number in enumerate(numbers, 1):
        end = numbers[place].start() if place < len(numbers) else len(text)
        if text[number.end() : end][:1].isspace():
            yield text[number.end() + 1 : end].rstrip()


def read_steps(text: str, images: Sequence[Path], num_before: int = 0) -> tuple[Steps, int]:
    """The steps of a story, and how many images are in them.

    num_before: images that count towards the ten, but are not in it.  With the last image that is allowed the story
    ends.  A mark without an image ends its step.
    """
    steps: Steps = []
    used = 0
    for number, step in enumerate(step_texts(text), 1):
        parts: list[str | Path] = [f"({number})"]
        for piece in _pieces(step):
            if piece is not None:
                parts.append(piece)
                continue
            if used >= len(images):
                break
            parts.append(images[used])
            used += 1
            if used + num_before >= MAX_IMAGES:
                break
        steps.append(tuple(parts))
        if used + num_before >= MAX_IMAGES:
            break
    return steps, used


def input_steps(item: Item) -> tuple[Steps, int]:
    """The steps of an item's input, and how many images are in them."""
    return read_steps(item.row["model_input"], [part for part in item.content if isinstance(part, Path)])


def _pieces(step: str) -> Iterator[str | None]:
    """Its texts; None for an image."""
    for piece in PIECE.findall(with_whole_tags(step)):
        if _is_mark(piece):
            yield None
        elif piece.strip() and not piece.startswith(LEFT_OUT):
            yield piece.strip()


def with_whole_tags(step: str, bracket: str = "]") -> str:
    """A step whose tags without an end begin with another bracket, since `PIECE` looks for the end of each; what it
    reads stays the same."""
    lines = step.split("\n")
    for tag in ("img", "imgblock"):
        parts = [line.rpartition(f"[/{tag}]") for line in lines]
        lines = [before + end + after.replace(f"[{tag}]", f"{bracket}{tag}]") for before, end, after in parts]
    return "\n".join(lines)


def _is_mark(piece: str) -> bool:
    return piece == MARK or piece.startswith("/IMGB")


def write_story(content: Content) -> str:
    """A story as that one text.

    Where its first text begins with a number, it is taken as numbered; otherwise each text begins a step, and so does
    each image before the first text.
    """
    if content and isinstance(content[0], str) and FIRST_NUMBER.match(content[0].lstrip()):
        return "".join(MARK if isinstance(part, Path) else part for part in content)
    steps: list[str] = []
    has_text = False
    for part in content:
        if isinstance(part, str):
            if part.strip():
                has_text = True
                steps.append(part.strip().replace(MARK, MARK[1:]))  # words; as a mark it would take an image
        elif has_text:
            steps[-1] += f" {MARK}"
        else:
            steps.append(MARK)
    return " ".join(f"({number}) {step}" for number, step in enumerate(steps, 1))


def read_story(text: str, images: Sequence[Path]) -> Content:
    """The texts and images of that one text, with the numbers of its steps; nothing where it has no steps.

    What is in no step is left out, and so are images without a mark; a mark without an image stays in the text.
    """
    steps = map(with_marks, step_texts(text))
    return place_images(" ".join(f"({number}) {step}" for number, step in enumerate(steps, 1)), images)


def with_marks(step: str) -> str:
    """A step with a mark in place of each image, however it is written."""
    marked = PIECE.sub(lambda piece: MARK if _is_mark(piece[0]) else piece[0], with_whole_tags(step, OPEN_TAG))
    return marked.replace(OPEN_TAG, "[")


def place_images(text: str, images: Sequence[Path]) -> Content:
    """A text with an image in place of each mark, as far as there are images."""
    before, *after = text.split(MARK)
    parts: list[str | Path] = [before]
    for number, piece in enumerate(after):
        if number < len(images):
            parts += [images[number], piece]
        else:
            parts[-1] = f"{parts[-1]}{MARK}{piece}"
    return tuple(part for part in parts if part)


def image_files(steps: Steps) -> list[Path]:
    """The images of a story."""
    return [part for step in steps for part in step if isinstance(part, Path)]


def texts_only(message: Message) -> Message:
    """A message without its images; the signs around them stay."""
    return tuple(part for part in message if isinstance(part, str))


def show_story(steps: Steps, first_image: int) -> Message:
    """Texts and images in order, each image between signs with its number."""
    return _numbered((part for step in steps for part in step), first_image, " ")


def show_pairs(texts: Steps, images: Steps, *, has_signs: bool) -> Message:
    """The texts of each step, then the images of the step of that number; steps without a partner are left out.

    has_signs: each image stands between signs with its number, from 0.
    """
    parts: list[str | Path] = []
    for text, step in zip(texts, images, strict=False):
        parts.append("".join(f" {part}" for part in text if isinstance(part, str)))
        parts += [part for part in step if isinstance(part, Path)]
    if has_signs:
        return _numbered(parts, 0, "")
    return tuple(show_image(part) if isinstance(part, Path) else part for part in parts)


def show_descriptions(descriptions: Sequence[str], images: Sequence[Path]) -> Message:
    """Descriptions and images in turns, both numbered from 0, as far as there are any.

    Raises ValueError for fewer descriptions than images, which the scorer cannot show.
    """
    if len(descriptions) < len(images):
        raise ValueError(f"{len(descriptions)} descriptions for {len(images)} images")
    shown: list[str | Image.Image] = []
    for number, description in enumerate(descriptions):
        shown.append(f"<Description_{number}> {description} </Description_{number}> ")
        if number < len(images):
            shown += [f"<Img_{number}>", show_image(images[number]), f"</Img_{number}>"]
    return tuple(shown)


def _numbered(parts: Iterable[str | Path], first: int, before: str) -> Message:
    shown: list[str | Image.Image] = []
    number = first
    for part in parts:
        if isinstance(part, Path):
            shown += [f"{before}<Img_{number}>", show_image(part), f"</Img_{number}>"]
            number += 1
        else:
            shown.append(part)
    return tuple(shown)


def show_image(file: Path) -> Image.Image:
    """An image as the scorer sends it: its longest side at most 512 pixels.  Transparency, at which it fails, is on
    white."""
    image = read_image(file)
    scale = max(*image.size, MAX_SIDE) / MAX_SIDE
    size = (max(1, int(image.width / scale)), max(1, int(image.height / scale)))
    return through_jpeg(image if size == image.size else image.resize(size))


def numbers_of(task: str) -> tuple[str, ...]:
    """The names of the numbers of an item of `task 1` to `task 4`, in the order of tables."""
    if task == "task 1":
        return tuple(TEXT_FIELDS)
    return tuple(name for name in FIELDS if name != "completeness" or task != "task 2")


def parse_numbers(answer: str, fields: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The numbers of the JSON in an answer, each from 0 to 10, null or "NA".  Raises Unreadable."""
    value = _json(answer)
    return {name: _number(value, path, is_text=fields == TEXT_FIELDS) for name, path in fields.items()}


def parse_descriptions(answer: str, first_image: int, num_images: int) -> list[str]:
    """The described images, numbered from the first one on, at least as many as there are; U+FFFD for half a
    surrogate pair, which no file takes.  Raises Unreadable."""
    described = _json(answer)
    for key in ("Tasks", "Create an Interleaved Text-Image Document"):
        described = _inside(described, key)
    if not isinstance(described, dict):
        raise Unreadable("the descriptions are no object")
    found = [described.get(f"Content of Image {first_image + number}") for number in range(len(described))]
    for number, text in enumerate(found, first_image):
        if not isinstance(text, str):
            raise Unreadable(f"no text `Content of Image {number}`")
    if len(found) < num_images:
        raise Unreadable(f"{len(found)} descriptions for {num_images} images")
    return [HALF_PAIR.sub("\ufffd", text) for text in found if isinstance(text, str)]


def _json(answer: str) -> Any:
    start, end = answer.find("{"), answer.rfind("}")
    if start < 0 or end < start:
        raise Unreadable("no JSON object")
    try:
        return json.loads(answer[start : end + 1])
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON ({' '.join(str(error).split())})") from None


def _inside(value: object, key: str) -> Any:
    if not isinstance(value, dict) or key not in value:
        raise Unreadable(f"no key {key!r}")
    return value[key]


def _number(value: Any, path: tuple[str, ...], is_text: bool) -> Any:
    *keys, last = path
    for key in keys:
        value = _inside(value, key)
    if is_text and isinstance(value, dict) and last not in value:
        last = SAME[last]
    number = _inside(value, last)
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if number is not None and number != NOT_APPLICABLE and not (is_number and 0 <= number <= 10):
        raise Unreadable(f"{'.'.join(path)} is no number from 0 to 10")
    return number


def item_scores(item: Item, answers: Mapping[str, Any], as_zero: bool) -> Scores:
    """The numbers of an item; null and "NA" are 0.  Without one of them it has none, or 0 everywhere."""
    given: dict[str, Any] = {}
    for answer in answers.values():
        given |= answer if isinstance(answer, Mapping) else {}
    names = numbers_of(item.category)
    if any(name not in given for name in names):
        return dict.fromkeys(names, 0.0) if as_zero else {}
    return {name: 0.0 if given[name] in (None, NOT_APPLICABLE) else float(given[name]) for name in names}


def means(rows: Sequence[tuple[Item, Scores]]) -> dict[str, float]:
    """Of the tasks in published tables together, then of each task."""
    found = {}
    for prefix, tasks in (("", TABLE_TASKS), *((f"task{number}_", (f"task {number}",)) for number in (3, 4, 1, 2))):
        for name in (*FIELDS, "text_fidelity"):
            values = [scores[name] for item, scores in rows if item.category in tasks and name in scores]
            if values:
                found[f"{prefix}{name}"] = sum(values) / len(values)
    return found
