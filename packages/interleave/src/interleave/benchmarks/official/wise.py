"""WISE: images whose prompts hint at what one has to know (arXiv 2503.07265), in its two editions."""

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from imgen_common.errors import UserError
from imgen_common.judging.questions import Question, Unreadable
from interleave.agents.sources import expect_places, find_file, functions
from interleave.benchmarks.base import Item, OfficialJudge, Output, Prompts, Scores
from interleave.benchmarks.official import files, reading
from interleave.benchmarks.official.answers import lone_digits, without_thinking
from interleave.datasets.files import RowError, validate

REPOSITORY, NUM_ITEMS, QUESTION = "PKU-YuanGroup/WISE", 1000, "score"
BUILDER = "build_evaluation_messages"  # the function of the authors' scripts that has their words
CATEGORIES = ("culture", "time", "space", "biology", "physics", "chemistry")
NAMES = ("cultural knowledge", "time", "space", "biology", "physical knowledge", "chemistry")
"""What the data calls the categories, in small letters."""
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
ONE_IMAGE = {"sees_several": False, "has_system": True}
PARTS = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
MARKS = "Consistency|Realism|Aesthetic Quality"
MARK_WEIGHTS = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    Prompt: str
    Explanation: str
    Category: str
    prompt_id: int = Field(ge=1, le=NUM_ITEMS)


class _Wise:
    """What both editions share.

    sizes: numbers of items of the categories, whose ids stand one after the other from 1.  folders: where the files
    of one of the tuples of `files` may lie.  scripts: which file may have the authors' words.
    """

    name: str
    title: str
    other: str
    judge: OfficialJudge
    sizes: tuple[int, ...]
    folders: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]
    scripts: tuple[str, ...]
    figure: str
    parse: Callable[[str], Any]

    def load(self, data: Path) -> list[Item]:
        """The 1,000 items of a folder, or of one file, by their ids.

        Raises UserError as the protocol says, for the other edition, and for an incomplete set: the authors' scorer
        refuses one too.  To judge fewer, take the first of them.
        """
        hint = f"give {self.folders[0]} of a copy of {REPOSITORY}; the other edition is the benchmark {self.other}"
        places = [[data / folder / name for name in names] for folder in self.folders for names in self.files]
        found = [data] if data.is_file() else next((place for place in places if any(map(Path.is_file, place))), None)
        if found is None:
            raise UserError(f"{data}: no file, nor a folder with {' or '.join(map(', '.join, self.files))}; {hint}")
        items = reading.unique_items(found, self._item, hint)
        if missing := sorted({*range(1, NUM_ITEMS + 1)} - {int(item.id) for item in items}):
            raise UserError(f"{data}: {len(missing)} of {NUM_ITEMS} items are missing, first {missing[0]}; {hint}")
        return sorted(items, key=lambda item: int(item.id))

    def read_prompts(self, repository: Path | None) -> Prompts:
        """Texts `system` and `user`, the second with places for Prompt and Explanation."""
        if repository is None:
            return reading.builtin_prompts(self.name)
        file = find_file(repository, self.scripts, REPOSITORY)
        texts = functions(file, BUILDER)[BUILDER]
        if len(texts) != 2:
            raise UserError(f"{file}: {BUILDER} has {len(texts)} texts, not 2; is it another version of {REPOSITORY}?")
        expect_places(texts[1], f"{file}: {BUILDER}", "Prompt", "Explanation")
        words = {"system": texts[0], "user": texts[1]}
        return Prompts(words, f"{self.scripts[0]} of {REPOSITORY}", is_official=True)

    def questions(self, item: Item, output: Output, prompts: Prompts, answers: Mapping[str, Any]) -> Sequence[Question]:
        """One question: the words, then the last image of the output.  Without an image there is none."""
        if QUESTION in answers or not output.images:
            return []
        words = reading.fill(prompts.texts["user"], Prompt=item.row["Prompt"], Explanation=item.row["Explanation"])
        message, system = (words, files.read_image(output.images[-1])), prompts.texts["system"]
        tokens = prompts.answer_tokens(20, 2 if self.name == "wise" else 12)
        return [Question(QUESTION, message, self.parse, system, answer_tokens=tokens)]

    def read_outputs(self, folder: Path, items: Sequence[Item]) -> dict[str, Output]:
        """The images `<prompt_id>.png` of a folder, which may be of another format than their suffix says.

        Raises UserError as the protocol says, and if there is none.
        """
        found = {item.id: file for item in items if (file := folder / f"{item.id}.png").is_file()}
        if not found:
            raise UserError(f"{folder}: has no image of an item; name them by prompt_id, 1.png to {NUM_ITEMS}.png")
        files.check_images(found.items(), "remove it, or generate it again")
        return {item_id: Output((file,)) for item_id, file in found.items()}

    def write_outputs(self, outputs: Mapping[str, Output], items: Sequence[Item], folder: Path) -> None:
        """Writes the last image of each output as `<prompt_id>.png`; an output without one is left out."""
        for item in items:
            if item.id in outputs and (images := outputs[item.id].images):
                files.write_png(images[-1], folder / f"{item.id}.png")

    def figures(self, rows: Sequence[tuple[Item, Scores]]) -> Mapping[str, float]:
        """Each category's mean, and `overall`, their sum by numbers of items, where every category has a mean.

        The authors' scorer refuses a set of which any item has no score.
        """
        means = {}
        for category in CATEGORIES:
            if values := [scores[self.figure] for item, scores in rows if item.category == category and scores]:
                means[category] = fmean(values)
        if len(means) == len(CATEGORIES):
            means["overall"] = sum(map(mul, self.sizes, means.values())) / NUM_ITEMS
        return means

    def _item(self, where: str, value: object) -> Item:
        row = validate(_Row, value, where)
        index = bisect_left(list(accumulate(self.sizes)), row.prompt_id)
        if row.Category.lower() != NAMES[index]:
            found = f"prompt_id {row.prompt_id} is of the category {row.Category!r}"
            raise RowError(f"{where}: {found}, in {self.title} of {NAMES[index]!r}, so this is other data")
        return Item(str(row.prompt_id), (row.Prompt,), CATEGORIES[index], row.model_dump())


class WiseVerified(_Wise):
    """WISE_Verified, the edition of April 2026: an image is right or not.  Scores and figures are in [0, 1]."""

    name, title = "wise", "WISE_Verified"
    judge = OfficialJudge("Qwen3.5-35B-A3B", {"temperature": 0.0, "max_tokens": 500, **NO_THINKING}, **ONE_IMAGE)
    other = "wise_legacy"
    sizes = (400, 120, 120, 120, 120, 120)
    folders = ("data_verified", "")
    files = (("merge.json",), tuple(f"{part}_verified.json" for part in PARTS))
    scripts = ("vllm_eval.py",)
    figure = "score"

    def parse(self, answer: str) -> int:
        """The first 0 or 1 after the word, or the only line of one alone; thinking is left out.  Raises Unreadable."""
        answer = re.sub(r"</think>\s*", "", without_thinking(answer))
        if found := re.search(r"\*{0,2}Score\*{0,2}\s*(?::\s*)?([01])\b", answer, re.IGNORECASE):
            return int(found[1])
        lines = lone_digits(answer, "01")
        if len(lines) != 1:
            raise Unreadable("no `Score: 0` or `Score: 1` in the answer")
        return int(lines[0])

    def score(self, item: Item, answers: Mapping[str, Any], *, as_zero: bool) -> Scores:
        """`score`, 0 or 1; a failed answer, or an image that is missing, has none, or 0."""
        value = answers.get(QUESTION)
        return {} if value is None and not as_zero else {"score": float(value or 0)}


class WiseLegacy(_Wise):
    """WISE as first published: three marks of 0 to 2 make a WiScore in [0, 1], of which figures are means."""

    name, title = "wise_legacy", "WISE (legacy)"
    judge = OfficialJudge("gpt-4o-2024-05-13", {"temperature": 0.0, "max_tokens": 2000}, **ONE_IMAGE)
    other = "wise"
    sizes = (400, 167, 133, 100, 100, 100)
    folders = ("WISE_legacy/data", "data", "")
    files = (tuple(f"{part}.json" for part in PARTS),)
    scripts = ("WISE_legacy/gpt_eval.py", "gpt_eval.py")
    figure = "wiscore"

    def parse(self, answer: str) -> dict[str, int]:
        """The three marks: the last digit after each name, also one above 2, as the authors' scorer takes it; without
        any name, the first three lines that are a mark alone.  Raises Unreadable if one is not there.
        """
        named = re.findall(
            r"\*{0,2}(Consistency|Realism|Aesthetic Quality)\*{0,2}\s*(?::\s*)?(\d)", answer, re.IGNORECASE
        )
        marks = {name.lower().replace(" ", "_"): int(digit) for name, digit in named}
        lines = lone_digits(answer, "012")
        if not marks and len(lines) >= 3:
            marks = dict(zip(MARK_WEIGHTS, map(int, lines), strict=False))
        if missing := [name for name in MARK_WEIGHTS if name not in marks]:
            raise Unreadable(f"no mark of {', '.join(missing)} in the answer")
        return marks

    def score(self, item: Item, answers: Mapping[str, Any], *, as_zero: bool) -> Scores:
        """The three marks, and `wiscore` = (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2.

        A failed answer, or an image that is missing, has none of them, or 0.
        """
        marks = answers.get(QUESTION) or (dict.fromkeys(MARK_WEIGHTS, 0) if as_zero else {})
        if not marks:
            return {}
        wiscore = sum(weight * marks[name] for name, weight in MARK_WEIGHTS.items()) / 2
        return {**{name: float(mark) for name, mark in marks.items()}, "wiscore": wiscore}
