"""CoMM: stories of texts and images, judged as wholes (Chen et al., arXiv 2406.10462).

As the authors' `eval_metric.py`, `gpt4o_eval.py` and `cal_gpt4o_score.py` have it.  Four tasks: 1 images to texts, 2
texts to images, 3 the rest of a story, 4 a story about a topic; published tables are of 3 and 4.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from imgen_common.errors import UserError, is_blank
from imgen_common.judging.questions import Message, Question
from imgen_common.tables import describe_type
from interleave.agents.sources import text_file
from interleave.benchmarks.base import Item, OfficialJudge, Output, Prompts, Scores
from interleave.benchmarks.official import comm_rules as rules
from interleave.benchmarks.official.files import check_images, copy_file, copy_image, image_path
from interleave.benchmarks.official.reading import builtin_prompts
from interleave.datasets.files import read_json, write_json

FOLDER = re.compile(r".+_task([1-4])")
RESULTS, ORIGIN = "results.json", "origin"
PICKLES = (".pth", ".pt", ".pkl")
SOURCE = (
    "CoMM's test set is weisuxi/CoMM on the Hugging Face Hub; make a folder of it that holds a folder of each item, "
    f"named <data_id>_task<N> with N from 1 to 4, with {RESULTS} (model_input, input_image_list) and the images in "
    f"{ORIGIN}/, as in eval/example of HKUST-LongGroup/CoMM; give the folder of them all"
)


class Comm:
    """Style, entities, trend, completeness, image quality and IRS, from 0 to 10."""

    name, title = "comm", "CoMM"
    judge = OfficialJudge("gpt-4o", {"temperature": 1.0}, has_system=True)

    def load(self, data: Path) -> list[Item]:
        """The items of a folder with a folder of each, by name.

        Items of task 3 with ten images in their input are left out: the authors' scorer skips them.
        Raises UserError naming the file, and for a pickle, which runs code when it is read.
        """
        items = []
        for folder in _item_folders(data):
            file = folder / RESULTS
            row = _read_row(file, ("model_input", "input_image_list"))
            if is_blank(row["model_input"]):
                raise UserError(f"{file}: model_input is empty; write what is to be told, or leave the item out")
            names = row["input_image_list"]
            if (marks := row["model_input"].count(rules.MARK)) != len(names):
                raise UserError(
                    f"{file}: {marks} {rules.MARK} marks in model_input for {len(names)} images in input_image_list; "
                    "write a mark for each image"
                )
            root = folder.absolute()
            images = [image_path(root / ORIGIN, name, str(file)) for name in names]
            task = f"task {folder.name[-1]}"
            item = Item(folder.name, rules.place_images(row["model_input"], images), task, row, root)
            if task != "task 3" or rules.input_steps(item)[1] < rules.MAX_IMAGES:
                items.append(item)
        images_of = [(item.id, part) for item in items for part in item.content if isinstance(part, Path)]
        check_images(images_of, "download it again, or leave the item out")
        return items

    def read_prompts(self, repository: Path | None) -> Prompts:
        """The authors' prompts are files of their own.  Raises UserError for one that is missing, or another one."""
        if repository is None:
            return builtin_prompts(self.name)
        texts = {}
        for name, key in rules.MENTIONED.items():
            file = repository / "eval" / "tot_metric" / "machine_evaluation_prompts" / f"{name}.json"
            texts[name] = text_file(file)
            if key not in texts[name]:
                raise UserError(f"{file}: does not ask for {key!r}; give a fresh copy of HKUST-LongGroup/CoMM")
        return Prompts(texts, "eval/tot_metric/machine_evaluation_prompts of HKUST-LongGroup/CoMM", True)

    def questions(self, item: Item, output: Output, prompts: Prompts, answers: Mapping[str, Any]) -> Sequence[Question]:
        """Task 1: `text`.  Others: `coherence`, `descriptions` of the images from the texts around them, and, once
        these are known, `match` of descriptions and images.  Nothing is asked where nothing could be shown.
        """
        given, num_before = rules.input_steps(item)
        first = num_before if item.category == "task 3" else 0
        made, _ = rules.read_steps(rules.write_story(output.content), output.images, first)
        if item.category == "task 1":
            shown = rules.show_pairs(made, given, has_signs=False)
            return (_ask("text", shown, rules.TEXT_FIELDS, prompts, rules.TASK_1),) if shown else ()
        if item.category == "task 2":
            shown = hidden = rules.show_pairs(given, made, has_signs=True)  # the authors' code hides none
            if not shown:
                return ()
        else:
            before = rules.show_story(given, 0) if item.category == "task 3" else (item.row["model_input"],)
            after = rules.show_story(made, first)
            shown = ("INPUT:", *before, "OUTPUT:", *after)
            hidden = ("INPUT:", *before, "OUTPUT:", *rules.texts_only(after))
        ending = "_task2" if item.category == "task 2" else ""
        files = rules.image_files(made)
        fields = {name: rules.FIELDS[name] for name in rules.numbers_of(item.category) if name != "irs"}
        num, each, describing = len(files), prompts.answer_tokens(40, 18), prompts.texts[rules.DESCRIPTIONS + ending]
        describe = partial(rules.parse_descriptions, first_image=first, num_images=num)
        asked = [
            _ask("coherence", shown, fields, prompts, rules.COHERENCE + ending),
            Question("descriptions", hidden, describe, describing, answer_tokens=each * num, example=["x" * 160] * num),
        ]
        if descriptions := answers.get("descriptions"):
            said = descriptions if ending else [f"Description:{text}" for text in descriptions]
            match = rules.show_descriptions(said, files)
            asked.append(_ask("match", match, {"irs": rules.FIELDS["irs"]}, prompts, rules.MATCH))
        return asked

    def score(self, item: Item, answers: Mapping[str, Any], *, as_zero: bool) -> Scores:
        """Numbers from 0 to 10, with null and "NA" as 0.

        An item of which any is missing has none, as upstream, where it is absent from all means; as_zero: all are 0.
        """
        return rules.item_scores(item, answers, as_zero)

    def figures(self, rows: Sequence[tuple[Item, Scores]]) -> Mapping[str, float]:
        """Means over items: of tasks 3 and 4 together, then `task3_...`, `task4_...`, `task1_...`, `task2_...`."""
        return rules.means(rows)

    def read_outputs(self, folder: Path, items: Sequence[Item]) -> dict[str, Output]:
        """`<id>/results.json` and the images beside it.

        What their scorer does not show is left out: a text before the first `(n) `, a story without any, and images
        without a mark.  Raises UserError for a folder without any item, and for an image that cannot be read.
        """
        outputs = {}
        for item in items:
            file = folder / item.id / RESULTS
            if file.is_file():
                row = _read_row(file, ("model_output", "prediction_image_list"))
                images = [image_path(file.parent, name, str(file)) for name in row["prediction_image_list"]]
                outputs[item.id] = Output(rules.read_story(row["model_output"], images))
        if items and not outputs:
            raise UserError(
                f"{folder}: no item's {RESULTS} in it, such as {items[0].id}/{RESULTS}; give the folder that CoMM's "
                "eval_metric.py takes as --predict_results_path"
            )
        images_of = [(name, image) for name, output in outputs.items() for image in output.images]
        check_images(images_of, "remove it from prediction_image_list, or generate it again")
        return outputs

    def write_outputs(self, outputs: Mapping[str, Output], items: Sequence[Item], folder: Path) -> None:
        """That layout, with the images of the input and of the truth, where they are there, in `origin/`.

        Raises UserError for an image that cannot be read, and where nothing can be written.
        """
        for item in items:
            if item.id not in outputs:
                continue
            output, place = outputs[item.id], folder / item.id
            origin = item.root / ORIGIN
            truth = [name for name in item.row.get("output_gt_image_list") or () if (origin / name).is_file()]
            for name in (*item.row["input_image_list"], *truth):
                copy_file(image_path(origin, name, item.id), place / ORIGIN / name)
            images = [copy_image(image, place, f"predict_{number}") for number, image in enumerate(output.images, 1)]
            row = {
                **{key: item.row[key] for key in ("model_input", "input_image_list")},
                "model_output": rules.write_story(output.content),
                "output_gt_image_list": truth,
                "prediction_image_list": images,
            }
            write_json(place / RESULTS, row)


def _ask(name: str, message: Message, fields: Mapping[str, tuple[str, ...]], prompts: Prompts, key: str) -> Question:
    parse, tokens = partial(rules.parse_numbers, fields=fields), prompts.answer_tokens(250, 12 * len(fields))
    return Question(name, message, parse, prompts.texts[key], answer_tokens=tokens)


def _item_folders(data: Path) -> list[Path]:
    if not data.exists():
        raise UserError(f"{data}: no such folder; {SOURCE}")
    entries = sorted(data.iterdir()) if data.is_dir() else [data]
    folders = [entry for entry in entries if entry.is_dir() and FOLDER.fullmatch(entry.name)]
    if folders:
        return folders
    if pickles := [entry for entry in entries if entry.suffix in PICKLES]:
        raise UserError(f"{pickles[0]}: a torch pickle, which runs code when it is read, so it is not; {SOURCE}")
    if (data / RESULTS).is_file():
        raise UserError(f"{data}: is the folder of one item; give the folder above it, or name it <data_id>_task<N>")
    raise UserError(f"{data}: no folder <data_id>_task<N> in it; {SOURCE}")


def _read_row(file: Path, keys: tuple[str, str]) -> dict[str, Any]:
    """The object in a file, with a text and a list of names under these keys.  Raises UserError."""
    row = read_json(file)
    if not isinstance(row, dict):
        raise UserError(f"{file}: must be an object with {' and '.join(keys)}, got {describe_type(row)}; {SOURCE}")
    if not isinstance(row.get(keys[0]), str):
        raise UserError(f"{file}: {keys[0]} must be a text, got {_describe(row, keys[0])}; {SOURCE}")
    for key in (keys[1], *(["output_gt_image_list"] if row.get("output_gt_image_list") is not None else [])):
        if not isinstance(row.get(key), list) or not all(isinstance(name, str) for name in row[key]):
            raise UserError(f"{file}: {key} must be a list of file names, got {_describe(row, key)}; {SOURCE}")
    return row


def _describe(row: Mapping[str, Any], key: str) -> str:
    return describe_type(row[key]) if key in row else "nothing"
