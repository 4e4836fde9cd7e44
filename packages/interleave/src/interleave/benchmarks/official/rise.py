"""RISEBench: one image and an instruction that takes reasoning to follow (Zhao et al., arXiv 2504.02826).

As the authors' `gpt_eval.py` has it, with two of its traits.  Once any item of the data has the key
`consistency_free`, its score ignores the consistency of all but logical items, for it takes an absent value for true:
`score_upstream` keeps that, `score` does not.  And once any item has `reasoning_wo_ins`, no judge of a logical item
with a reference image reads the instruction.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from imgen_common.errors import UserError
from imgen_common.judging.questions import Question
from interleave.agents.sources import constants, expect_places
from interleave.benchmarks.base import Item, OfficialJudge, Output, Prompts, Scores
from interleave.benchmarks.official.files import (
    SUFFIXES,
    check_images,
    copy_image,
    image_path,
    read_image,
    through_jpeg,
)
from interleave.benchmarks.official.reading import builtin_prompts, fill
from interleave.benchmarks.official.rise_rules import (
    CATEGORIES,
    COLUMNS,
    PROMPTS,
    dimensions,
    is_logical,
    is_set,
    item_scores,
    parse_mark,
    percentages,
    plan,
)
from interleave.datasets.files import read_json

DATA_FILES = ("data_total.json", "datav2_total_w_subtask.json")
KEYS = ("index", "category", "instruction", "image")
ANSWERS = {"spatial_reasoning": ("reference", "reference_img"), "logical_reasoning": ("reference_txt", "reference_img")}
"""Keys of which an item needs one; others need `reference`."""
MAX_SIDE = 768
SOURCE = (
    f"get RISEBench: its 64 items are the folder `data` of PhoenixZ810/RISEBench with {DATA_FILES[0]}, its 360 are "
    f"PhoenixZ/RISEBench on the Hugging Face Hub: {DATA_FILES[1]} with data.zip unpacked beside it; give that folder"
)


class Rise:
    """Accuracy first: the share of items that the judge gives full marks.  An output's last image is the answer."""

    name, title = "rise", "RISEBench"
    judge = OfficialJudge("gpt-4.1-2025-04-14", {"temperature": 0, "max_tokens": 4096, "image_detail": "high"})

    def load(self, data: Path) -> list[Item]:
        """The items of a folder with one of the two JSON files, or of a JSON file, and the images below it.

        Raises UserError naming the file and the item.
        """
        file = _data_file(data)
        rows = read_json(file)
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{file}: must be a list of items; {SOURCE}")
        named = [(f"{file}: item {number}", row) for number, row in enumerate(rows, 1)]
        seen = dict[str, str]()
        for where, row in named:
            _check_row(row, where)
            if (other := seen.setdefault(str(row["index"]), where)) != where:
                raise UserError(f"{where}: has the index {row['index']!r} of {other}; remove one of them")
        columns = sorted({key for row in rows for key in row})
        base = file.parent.absolute()
        # the archive of the 360 unpacks to a folder of its own
        root = next((folder for folder in (base, base / "data") if (folder / rows[0]["image"]).is_file()), base)
        items, images = [], []
        for where, row in named:
            shown = [row[key] for key in ("image", "reference_img") if is_set(row, key)]
            images += [(where, image_path(root, name, where)) for name in shown]
            content = (root / row["image"], row["instruction"])
            items.append(Item(str(row["index"]), content, row["category"], {**row, COLUMNS: columns}, root))
        check_images(images, "download it again, or correct the item")
        return items

    def read_prompts(self, repository: Path | None) -> Prompts:
        """The authors' prompts are constants of their `utils.py`.  Raises UserError for one that is not there."""
        if repository is None:
            return builtin_prompts(self.name)
        file = repository / "utils.py"
        found = constants(file)
        for name, needed in PROMPTS.items():
            if (text := found.get(f"prompt_{name}")) is None:
                raise UserError(f"{file}: no text prompt_{name} in it; give a copy of PhoenixZ810/RISEBench")
            expect_places(text, f"{file}: prompt_{name}", *needed)
        return Prompts({name: found[f"prompt_{name}"] for name in PROMPTS}, "utils.py of PhoenixZ810/RISEBench", True)

    def questions(self, item: Item, output: Output, prompts: Prompts, answers: Mapping[str, Any]) -> Sequence[Question]:
        """Up to three questions, each a text, then images as the authors' judge gets them; none without a result.

        An answer that cannot be read is not asked for again, as there.
        """
        if not output.images:
            return ()
        has_text_answer = is_logical(item) and is_set(item.row, "reference_txt")
        reference = item.row.get("reference_txt" if has_text_answer else "reference")
        values = {"instruct": item.row["instruction"], "reference": str(reference)}
        result = _shown(output.images[-1])
        asked, parse = [], partial(parse_mark, is_logical=is_logical(item))
        tokens = prompts.answer_tokens(150, 6)
        for dimension, prompt, key in plan(item):
            if dimension in dimensions(item):
                first = () if key is None else (_shown(image_path(item.root, item.row[key], item.id)),)
                message = (fill(prompts.texts[prompt], **values), *first, result)
                asked.append(Question(dimension, message, parse, tries=1, answer_tokens=tokens))
        return asked

    def score(self, item: Item, answers: Mapping[str, Any], *, as_zero: bool) -> Scores:
        """`accuracy` 0 or 1, and from 1 to 5 `score`, `score_upstream` and the dimensions.

        An item with an answer that failed has none of them; as_zero: such an answer is the worst.  Upstream its
        accuracy is 0, as with as_zero, but it has no score, as without.
        """
        return item_scores(item, answers, as_zero)

    def figures(self, rows: Sequence[tuple[Item, Scores]]) -> Mapping[str, float]:
        """In percent, over all items and by category: accuracy; scores s and dimensions as 25 (s - 1)."""
        return percentages(rows)

    def read_outputs(self, folder: Path, items: Sequence[Item]) -> dict[str, Output]:
        """`images/{category}/{index}` as .png, .jpg or .jpeg, given the folder `images` or the one above it.

        Raises UserError for a folder without an image of any item, and for an image that cannot be read.
        """
        base = folder / "images" if (folder / "images").is_dir() else folder
        found = {}
        for item in items:
            files = (base / item.category / f"{item.id}.{suffix}" for suffix in SUFFIXES)
            if path := next((file for file in files if file.exists()), None):
                found[item.id] = Output((path,))
        if items and not found:
            raise UserError(
                f"{folder}: no image of any item in it, such as images/{items[0].category}/{items[0].id}.png; give the "
                "folder that RISEBench's gpt_eval.py takes as --output"
            )
        images = [(f"item {index}", path) for index, output in found.items() for path in output.images]
        check_images(images, "remove it, or generate it again")
        return found

    def write_outputs(self, outputs: Mapping[str, Output], items: Sequence[Item], folder: Path) -> None:
        """The last image of each output in that layout.  An item without one is left out; their scorer ends there.

        Raises UserError for an image that cannot be read, and where nothing can be written.
        """
        for item in items:
            if item.id in outputs and (images := outputs[item.id].images):
                copy_image(images[-1], folder / "images" / item.category, item.id)


def _data_file(data: Path) -> Path:
    if not data.exists():
        raise UserError(f"{data}: no such folder; {SOURCE}")
    if not data.is_dir():
        return data
    found = [data / name for name in DATA_FILES if (data / name).is_file()]
    if len(found) == 2:
        raise UserError(f"{data}: holds {' and '.join(DATA_FILES)}, two versions; give one of the files")
    if not found:
        raise UserError(f"{data}: holds neither {' nor '.join(DATA_FILES)}; {SOURCE}")
    return found[0]


def _check_row(row: object, where: str) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object with {', '.join(KEYS)}; {SOURCE}")
    for key in KEYS:
        if not is_set(row, key):
            raise UserError(f"{where}: has no {key!r}, which every item of RISEBench has; {SOURCE}")
        if not isinstance(row[key], str) and not (key == "index" and type(row[key]) is int):
            raise UserError(f"{where}: {key} must be a text, got {row[key]!r}; {SOURCE}")
    index = str(row["index"])
    if not index.strip(". ") or set(index) & set("/\\\0"):
        raise UserError(f"{where}: index {index!r} cannot be the name of a file; change it")
    if row["category"] not in CATEGORIES:
        raise UserError(f"{where}: unknown category {row['category']!r}; allowed: {', '.join(CATEGORIES)}")
    needed = ANSWERS.get(row["category"], ("reference",))
    if not any(is_set(row, key) for key in needed):
        raise UserError(f"{where} ({index}): has no {' and no '.join(needed)}, so no judge knows the answer; {SOURCE}")


def _shown(file: Path) -> Image.Image:
    """An image as upstream sends it, but upright, and shrunk from all its pixels even where it is a JPEG."""
    image = read_image(file, drop_alpha=True)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return through_jpeg(image)
