"""`reward.json`: what a vision-language model is asked about an image, and how its answer becomes a score."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import Field, field_validator, model_validator

from imgen_common.config import Config, load
from imgen_common.errors import UserError
from imgen_common.http.chat import split_reasoning
from imgen_common.judging.objects import ParseMode, UnreadableAnswer, read_object

FILE = "reward.json"
PROMPT, SOURCE, IMAGE = "{prompt}", "<source>", "<image>"
"""Places in a template: of the prompt, of the source images, and of the image that is scored."""
PLACE = re.compile(f"({re.escape(PROMPT)}|{SOURCE}|{IMAGE})")
NUMBER = re.compile(r"[-+]?\d{1,9}(?:\.\d{1,9})?")


class ObjectRule(Config):
    """Accepts an answer `<think>...</think><answer>{...}</answer>` whose object has a wanted value.

    Answers are read as those of `interleave`'s critics are; one that cannot be read is not accepted.
    """

    kind: Literal["object"] = "object"
    key: str
    """Key of the verdict in the object."""
    equals: bool | None = None
    """The verdict that accepts, or"""
    at_least: float | None = None
    """the least number that accepts; one of both is given."""
    texts: tuple[str, ...] = ()
    """Keys that must hold texts, or the answer counts as unreadable."""
    parse_mode: ParseMode = "strict"
    """`strict` JSON after a `<think>` that is opened and closed, `tolerant` of Python's literals and small slips, or
    `direct`: strict JSON that may stand without `<think>`."""

    @model_validator(mode="after")
    def _has_one_condition(self) -> "ObjectRule":
        if (self.equals is None) == (self.at_least is None):
            raise ValueError("give either equals, for a verdict that is true or false, or at_least, for a number")
        return self

    def accepts(self, answer: str) -> bool:
        """Whether the model accepted the image.  Takes time linear in the answer, longest repairs apart."""
        try:
            value = read_object(answer, self.parse_mode)[1]
        except UnreadableAnswer:
            return False
        texts = [value.get(name) for name in self.texts]
        if not all(isinstance(text, str) and (self.parse_mode != "tolerant" or text != "None") for text in texts):
            return False
        verdict = value.get(self.key)
        if self.at_least is None:
            return isinstance(verdict, bool) and verdict == self.equals
        return isinstance(verdict, int | float) and not isinstance(verdict, bool) and verdict >= self.at_least


class NumberRule(Config):
    """Accepts an answer in which a number is large enough: the first one after the last `after`."""

    kind: Literal["number"] = "number"
    after: str = ""
    """Words before the number, such as `Final Score:`; empty: the first number after the reasoning."""
    at_least: float
    """The least number that accepts."""

    def accepts(self, answer: str) -> bool:
        """Whether the model accepted the image."""
        said = split_reasoning(answer)[1]
        if self.after:
            _, found, said = said.rpartition(self.after)
            said = said if found else ""
        number = NUMBER.search(said)
        return number is not None and float(number[0]) >= self.at_least


class TextRule(Config):
    """Accepts an answer that begins with some words after its reasoning, in upper or lower case."""

    kind: Literal["text"] = "text"
    begins: Annotated[str, MinLen(1)]
    """These words, such as `yes`."""

    def accepts(self, answer: str) -> bool:
        """Whether the model accepted the image."""
        return split_reasoning(answer)[1].strip().lower().startswith(self.begins.lower())


class TokenAnswer(Config):
    """The score is read off the next token, which the model is asked for directly; for models that do not reason.

    With `token`: log-odds, log(p(token) / p(against)); without `against`, log(p / (1 - p)), which orders images as
    VQAScore (arXiv 2404.01291) does.  With `scale`: the expectation of its values, sum_t p(t) value(t) / sum_t p(t).
    """

    kind: Literal["token"] = "token"
    token: str | None = None
    """The answer that is wanted, one token of the model, such as `Yes`."""
    against: tuple[str, ...] = ()
    """The answers that are not, such as `[No]`; empty: all other tokens."""
    scale: Mapping[str, float] = {}
    """Instead of `token`: the value of each answer, such as `{"1": 1, "2": 2, "3": 3}`; {"Yes": 1, "No": 0} gives a
    probability."""
    prefix: str = ""
    """Beginning of the answer that is taken as said, such as `Score: `."""

    @model_validator(mode="after")
    def _has_one_form(self) -> "TokenAnswer":
        if (self.token is None) != bool(self.scale) or (self.scale and self.against):
            raise ValueError("give either token, perhaps with against, or scale")
        if len(self.scale) == 1 or self.token in self.against:
            raise ValueError("needs different tokens to compare")
        return self


class SampledAnswer(Config):
    """The score is the share of sampled answers that accept the image; for models that reason before they judge.

    Its gradient is an unbiased estimate of that of the probability of acceptance; see `VlmReward`.
    """

    kind: Literal["sampled"] = "sampled"
    accept: Annotated[ObjectRule | NumberRule | TextRule, Field(discriminator="kind")]
    """Which answers accept."""
    num_answers: Annotated[int, Ge(2), Le(256)] = 8
    """Answers sampled for each image."""
    max_new_tokens: Annotated[int, Ge(1)] = 1024
    """Longest answer in tokens; also bounded by the model's positions.  One that is cut off is judged as it is."""
    temperature: Annotated[float, Gt(0), Le(2)] = 1.0
    """Of the sampling."""
    answers_per_forward: Annotated[int, Ge(1)] = 8
    """Answers whose gradient is computed at once; fewer take less memory and change nothing but rounding."""


class GivenAnswer(Config):
    """The score is the mean log-likelihood per token of an answer, the end of turn included."""

    kind: Literal["given"] = "given"
    text: str | None = None
    """The answer; an attribute `answer` of a prompt goes before it."""


class VlmSettings(Config):
    """What `reward.json` holds."""

    template: str
    """The user's turn: `{prompt}` is the place of the prompt, `<image>` that of the image that is scored, `<source>`
    that of the source images of an edit.  All other braces and brackets mean themselves."""
    answer: Annotated[TokenAnswer | SampledAnswer | GivenAnswer, Field(discriminator="kind")]
    """How the score is read: `token`, `sampled` or `given`."""
    max_sources: Annotated[int, Ge(1)] | None = None
    """Most source images that are shown; of more, the last ones.  null: all."""
    blank_source: bool = False
    """Whether an image without sources is shown with a white one of its size in their place, as `interleave`'s critics
    expect; false: with nothing there."""

    @field_validator("template")
    @classmethod
    def _has_places(cls, value: str) -> str:
        for place, allowed in ((IMAGE, "once"), (SOURCE, "at most once")):
            if (count := value.count(place)) > 1 or (count == 0 and place == IMAGE):
                raise ValueError(f"has {count} places {place}; it must stand in it {allowed}")
        return value

    @classmethod
    def load(cls, folder: Path) -> "VlmSettings":
        """The settings of a reward's folder.  Raises UserError without them."""
        if not (folder / FILE).is_file():
            raise UserError(
                f"{folder}: no {FILE} in it, which says what the model is asked; write one (docs/flowbp.md, "
                "'Vision-language models as rewards') or make the folder with `interleave export-reward`"
            )
        return load(cls, [folder / FILE])
