"""UEval: questions that are answered in words and images, each judged by rubrics of its own (arXiv 2601.22155)."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from imgen_common.errors import UserError
from imgen_common.judging.questions import Question, Unreadable
from interleave.agents.sources import constants, expect_places, find_file
from interleave.benchmarks.base import Item, OfficialJudge, Output, Prompts, Scores
from interleave.benchmarks.official import files, reading
from interleave.benchmarks.official.answers import from_to
from interleave.datasets.files import read_each, read_items, validate, write_json
from interleave.datasets.formats.execution import folder_name
from interleave.datasets.formats.ueval import UevalPrediction

DATA = "the split `test` of the data set zlab-princeton/UEval on the Hugging Face Hub"
CLOSED = ("space", "textbook", "diagram", "paper")
TASKS = ("art", "life", "tech", "exercise", *CLOSED)
OTHER = "other"
"""Category of items whose task is none of the eight."""
KINDS = ("text", "image")
FILES = (
    *("test-*.parquet", "*/test-*.parquet", "*.parquet", "data-*.arrow", "test/data-*.arrow"),
    *("test*.jsonl", "test*.json"),
)
"""The items in a copy of the data set, or in what the library `datasets` saved to disk."""
PARTS = {
    "text": ("TEXT_TEMPLATE", "TEXT_RUBRIC_TEMPLATE"),
    "image_open": ("IMAGE_TEMPLATE_OPEN", "IMAGE_RUBRIC_TEMPLATE"),
    "image_closed": ("IMAGE_TEMPLATE_CLOSED", "IMAGE_RUBRIC_TEMPLATE"),
}
"""Our prompts, each with the authors' two texts of which it is made."""
PREDICTIONS, TRIES = "predictions.json", 10
"""The authors ask up to 500 times for an answer that can be read."""

Rubric = Annotated[str, BeforeValidator(lambda given: given.get("criterion") if isinstance(given, dict) else given)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    id: str | int
    prompt: str
    task: str | None
    text_rubrics: list[Rubric] | None
    image_rubrics: list[Rubric] | None


class Ueval:
    """UEval.  An item's scores are the shares of rubrics that are met, `text` and `image`, in [0, 1].

    Figures are percentages, as on the authors' leaderboard.
    """

    name, title = "ueval", "UEval"
    judge = OfficialJudge("gemini-2.5-pro")

    def load(self, data: Path) -> list[Item]:
        """The items of a .json, .jsonl or .parquet file, or of a folder with the shards, or made by `save_to_disk`."""
        return reading.unique_items(reading.find_files(data, FILES, DATA), _item, f"give {DATA}")

    def read_prompts(self, repository: Path | None) -> Prompts:
        """Texts `text`, `image_open` and `image_closed` with places for question, text_answer and rubric_item."""
        if repository is None:
            return reading.builtin_prompts(self.name)
        file = find_file(repository, ("ueval_eval.py",), "zlab-princeton/UEval")
        found = constants(file, *{name for pair in PARTS.values() for name in pair})
        texts = {key: "\n\n".join(found[name] for name in pair) for key, pair in PARTS.items()}
        texts = {key: re.sub(r"<<(\w+)>>", r"{\1}", text) for key, text in texts.items()}
        for key, text in texts.items():
            places = ("question", "rubric_item", "text_answer")[: 2 if key == "image_closed" else 3]
            expect_places(text, f"{file}: {' with '.join(PARTS[key])}", *places)
        return Prompts(texts, "ueval_eval.py of zlab-princeton/UEval", is_official=True)

    def questions(self, item: Item, output: Output, prompts: Prompts, answers: Mapping[str, Any]) -> Sequence[Question]:
        """One question a rubric, `text 1`, ..., `image 1`, ...: the words, then for `image` all images.

        An output without words or images is judged as it is, as an empty reply.
        """
        words = {"text": "text", "image": "image_closed" if item.category in CLOSED else "image_open"}
        values = {"question": item.row["prompt"], "text_answer": "".join(output.texts)}
        questions, tokens = [], prompts.answer_tokens(10, 6)
        for kind in KINDS:
            asked = {f"{kind} {n}": rubric for n, rubric in enumerate(_rubrics(item, kind), 1)}
            asked = {name: rubric for name, rubric in asked.items() if name not in answers}
            images = [files.read_image(file) for file in output.images] if asked and kind == "image" else []
            for name, rubric in asked.items():
                text = reading.fill(prompts.texts[words[kind]], rubric_item=rubric, **values)
                questions.append(Question(name, (text, *images), parse_met, tries=TRIES, answer_tokens=tokens))
        return questions

    def score(self, item: Item, answers: Mapping[str, Any], *, as_zero: bool) -> Scores:
        """The share of rubrics that are met, of each kind that the item has.

        as_zero: a failed question counts as not met; otherwise it leaves both numbers of the share.
        """
        scores = {}
        for kind in KINDS:
            met = [answers.get(f"{kind} {number}") for number in range(1, len(_rubrics(item, kind)) + 1)]
            counted = [value for value in met if as_zero or value is not None]
            if counted:
                scores[kind] = sum(value is True for value in counted) / len(counted)
        return scores

    def figures(self, rows: Sequence[tuple[Item, Scores]]) -> Mapping[str, float]:
        """Percentages: `text` and `image`, unweighted means over items; `mean` of the two; each task's mean of its
        own two; `macro`, the mean over tasks, which is the leaderboard's; `item_mean`, over the means of items.

        A mean of two of which one is not there is the other one.
        """
        both = _rates([scores for _, scores in rows])
        tasks = {task: _rates([scores for item, scores in rows if item.category == task]) for task in (*TASKS, OTHER)}
        of_tasks = {task: fmean(rates.values()) for task, rates in tasks.items() if rates}
        of_items = [fmean(scores.values()) for _, scores in rows if scores]
        if not of_items:
            return {}
        means = {"macro": fmean(of_tasks.values()), "item_mean": fmean(of_items)}
        figures = both | {"mean": fmean(both.values())} | of_tasks | means
        return {name: 100 * value for name, value in figures.items()}

    def read_outputs(self, folder: Path, items: Sequence[Item]) -> dict[str, Output]:
        """The predictions in a JSON file, or in a folder's `predictions.json`; an item without one has an empty output.

        Of several predictions for an id the last counts.  Relative paths of images are looked for from the working
        directory, as the authors' scorer does, then from the file's folder.  Raises UserError as the protocol says,
        and if no prediction is for one of the items.
        """
        file = folder / PREDICTIONS if folder.is_dir() else folder
        read = read_each(read_items(file), lambda where, value: (where, validate(UevalPrediction, value, where)), None)
        given = {str(prediction.id): (where, prediction) for where, prediction in read}
        if not any(item.id in given for item in items):
            raise UserError(f"{file}: no prediction has the id of an item; give predictions for this data set")
        outputs = {item.id: Output(()) for item in items}
        for item_id in outputs:
            if item_id in given:
                where, prediction = given[item_id]
                images = [files.find_image(path, (Path(), file.parent), where) for path in prediction.image_paths]
                outputs[item_id] = Output((*filter(None, [prediction.text_answer]), *images))
        images_of = [(key, image) for key, output in outputs.items() for image in output.images]
        files.check_images(images_of, "remove it from the predictions, or generate it again")
        return outputs

    def write_outputs(self, outputs: Mapping[str, Output], items: Sequence[Item], folder: Path) -> None:
        """Writes `predictions.json` and `images/ID/1.png`, ... beside it, whose paths count from that folder.

        The authors' scorer, which looks for them from its working directory, is to be started there.
        """
        predictions = []
        for item in items:
            if (output := outputs.get(item.id)) is None:
                continue
            names = [f"images/{folder_name(item.id)}/{n}.png" for n, _ in enumerate(output.images, 1)]
            for image, name in zip(output.images, names, strict=True):
                files.write_png(image, folder / name)
            answer = {"image_answer": names, "text_answer": "".join(output.texts)}
            predictions.append({"id": item.id, "prompt": item.row["prompt"], "task": item.row["task"], **answer})
        write_json(folder / PREDICTIONS, predictions)


def parse_met(answer: str) -> bool:
    """Whether an answer says that a rubric is met; "not sure", a number and no value say no.  Raises Unreadable."""
    value = _json_object(answer).get("criteria_met")
    return value.strip().lower() in ("true", "yes", "y", "1") if isinstance(value, str) else value is True


def _json_object(answer: str) -> dict[str, Any]:
    """The first that can be read of: a block of JSON; an object that begins with a known key; all from the first
    brace to the last; the same with single backslashes doubled.

    As the authors' expressions, whose time is quadratic: ```json\\s*({.*?})\\s*```, {\\s*"(known)"[^}]*} and {.*}.
    """
    block = from_to(answer, r"```json\s*(?=\{)", r"\}(?=\s*```)")
    known = from_to(answer, r'(?=\{\s*"(?:criteria_met|explanation)")', r"\}")
    whole = answer[answer.find("{") : answer.rfind("}") + 1] if "{" in answer else ""
    texts = [block, known, whole]
    texts.append(re.sub(r'(?<!\\)\\(?!["\\/bfnrtu])', r"\\\\", texts[-1]))
    for text in texts:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            continue
    raise Unreadable('no JSON object with "criteria_met" in the answer' if not whole else "its JSON is damaged")


def _item(where: str, value: object) -> Item:
    row = validate(_Row, value, where)
    task = (row.task or "").strip().lower()
    return Item(str(row.id), (row.prompt,), task if task in TASKS else OTHER, row.model_dump())


def _rubrics(item: Item, kind: str) -> list[str]:
    return item.row[f"{kind}_rubrics"] or []


def _rates(scores: Sequence[Scores]) -> dict[str, float]:
    given = {kind: [row[kind] for row in scores if kind in row] for kind in KINDS}
    return {kind: fmean(values) for kind, values in given.items() if values}
