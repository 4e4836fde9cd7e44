"""Every prompt the agents read and every answer they are taught, made in one place for training and run time alike.

What a user or a model wrote goes into a template through `escape_control_tokens`: no tokenizer reads a control token
out of it, no template a placeholder, no reader of an answer a tag.  Records keep the text as it was given.
"""

import bisect
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from imgen_common.config import Config
from imgen_common.errors import UserError, nearest
from imgen_common.files import local_path, read_text
from imgen_common.judging.escaping import OPENING, escape_control_tokens
from imgen_common.tables import CONTROL_TOKEN
from interleave.agents.sources import constants
from interleave.protocols import BackendError, CriticInput, HashedImage, Message
from interleave.records import Plan, Request, Verdict

BUILTIN = (
    "planner_text planner_images critic critic_story judge_semantics judge_quality shapes_planner shapes_critic "
    "rational_rewards_edit rational_rewards_t2i"
).split()
PLACEHOLDERS = ("text_input", "original_instruction", "rewritten_prompt", "request", "story")
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
IMAGE_MARKER = "<image>"


class TemplateFile(Config):
    """A template exactly as its file has it, white space at its ends included, as a trained model has seen it."""

    file: str
    """A .txt file, or FILE.py:NAME, a text constant in a Python file, which is read and never run."""
    prefix: str = ""
    """What stands before it, such as `<image><image>` and a line feed."""


TemplateRef = str | TemplateFile
"""A built-in template's name, a .txt file, whose ends are trimmed, or a `TemplateFile`."""


@dataclass(frozen=True)
class Template:
    """A prompt with placeholders such as `{text_input}`; all other braces mean themselves.

    Each `<image>` in it is the place of one image; without any, all images stand before the text.
    """

    name: str
    text: str

    @property
    def num_places(self) -> int:
        """How many images it has places for."""
        return self.text.count(IMAGE_MARKER)

    @property
    def hash(self) -> str:
        """sha256 (hex) of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def placeholders(self) -> frozenset[str]:
        """Their names."""
        return frozenset(PLACEHOLDER.findall(self.text))


def load_template(ref: TemplateRef) -> Template:
    """The template of a reference.

    Raises UserError if there is none, it is not UTF-8, empty, or holds an unknown placeholder or a control token.
    """
    if isinstance(ref, TemplateFile):
        found = Template(ref.file, ref.prefix + _exact_text(ref.file))
    elif ref in BUILTIN:
        text = (resources.files("interleave.agents") / "templates" / f"{ref}.txt").read_text(encoding="utf-8")
        return Template(ref, text.strip())
    else:
        path = local_path(ref)
        if path.suffix != ".txt":
            allowed = f"{', '.join(BUILTIN)} or the path of a .txt file"
            raise UserError(f"template {ref!r}: unknown{nearest(ref, BUILTIN)}; allowed: {allowed}")
        found = Template(ref, read_text(path).strip())
    _check(found)
    return found


def _exact_text(ref: str) -> str:
    file, _, name = ref.rpartition(":") if ".py:" in ref else (ref, "", "")
    path = local_path(file)
    if path.suffix not in (".txt", ".py") or bool(name) != (path.suffix == ".py"):
        raise UserError(f"template {ref!r}: must be the path of a .txt file, or FILE.py:NAME of a text constant")
    try:
        return constants(path, name)[name] if name else read_text(path)
    except UserError as error:
        if path.exists():
            raise
        remedy = "put it there, as the first lines of the recipe say, or give another template"
        raise UserError(f"{error}; {remedy}") from None


def _check(found: Template) -> None:
    for name in sorted(found.placeholders - set(PLACEHOLDERS)):
        allowed = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
        raise UserError(
            f"template {found.name}: unknown placeholder {{{name}}}{nearest(name, PLACEHOLDERS)}; allowed: {allowed}"
        )
    if not found.placeholders:
        raise UserError(f"template {found.name}: no placeholder in it, so every prompt would be the same; add one")
    if token := CONTROL_TOKEN.search(found.text.replace(IMAGE_MARKER, "")):
        raise UserError(
            f"template {found.name}: remove {token[0]}; {IMAGE_MARKER} is the place of an image, and turns are made by "
            "the model's chat template"
        )


def expect_planner(template: Template) -> None:
    """Raises UserError if the template is not a planner's."""
    _expect(template, {"text_input"}, {"text_input"})


def render_planner(template: Template, text: str | Message, images: Sequence[HashedImage]) -> Message:
    """What the planner reads: the template with the request's words, and its images before it or in their places.

    text: the words, or words and images in order (`words_and_images`); then `images` is empty.  Raises UserError if
    the template is not a planner's, and BackendError, `refused`, where it has places for another number of images.
    """
    expect_planner(template)
    return _fill(template, {"text_input": (text,) if isinstance(text, str) else text}, images)


def words_and_images(request: Request, images: Sequence[HashedImage]) -> tuple[str | Message, Sequence[HashedImage]]:
    """What `render_planner` is given of a request: its words with the images in their places, or before them."""
    if not request.texts:
        return request.text, images
    parts: list[str | HashedImage] = [request.texts[0]]
    for image, text in zip(images, request.texts[1:], strict=True):
        parts += [image, text]
    return tuple(part for part in parts if part != ""), ()


def render_critic(template: Template, shown: CriticInput) -> Message:
    """What the critic reads: the image before, the image after, then the template, unless it has places for both.

    An empty `prompt_used` means the original prompt.  `{story}` becomes the words and images accepted so far, in
    place.  Raises UserError if the template is not a critic's, or has a place for one image, or for more than two.
    """
    if template.num_places not in (0, 2):
        raise UserError(f"template {template.name}: {template.num_places} places for images; a critic is shown 2")
    _expect(template, {"original_instruction", "rewritten_prompt"}, set(PLACEHOLDERS) - {"text_input"})
    story: list[str | HashedImage] = []
    for words, image in shown.story:
        story += [words, "\n"] if image is None else [words, "\n", image, "\n"]
    values: dict[str, Sequence[str | HashedImage]] = {
        "original_instruction": [shown.original_prompt],
        "rewritten_prompt": [shown.prompt_used or shown.original_prompt],
        "request": [shown.request],
        "story": story or ["nothing yet"],
    }
    return _fill(template, values, (shown.before, shown.after))


def render_rational_rewards(template: Template, shown: CriticInput) -> Message:
    """What RationalRewards reads: the template, with the images in their places.

    The image before is shown for an edit only.  The instruction is what was asked, as in the scripts of its authors.
    Raises UserError if the template is not one for this.
    """
    images = (shown.before, shown.after) if shown.is_edit else (shown.after,)
    if template.num_places != len(images):
        what = f"{template.num_places} {IMAGE_MARKER}, and is shown {len(images)} images"
        raise UserError(f"template {template.name}: has {what}; put the marker where each belongs")
    _expect(template, {"original_instruction"}, {"original_instruction"})
    return _fill(template, {"original_instruction": [shown.original_prompt]}, images)


def render_judge(template: Template, instruction: str, images: Sequence[HashedImage]) -> Message:
    """What a judge reads: the images, then the template; `instruction` is what was asked, never the critic's words.

    Raises UserError if the template is not a judge's.
    """
    _expect(template, set(), {"original_instruction"})
    return _fill(template, {"original_instruction": [instruction]}, images)


def _expect(template: Template, needed: set[str], allowed: set[str]) -> None:
    for name in sorted(needed - template.placeholders):
        raise UserError(f"template {template.name}: {{{name}}} is missing; it is not a template for this agent")
    for name in sorted(template.placeholders - allowed):
        raise UserError(f"template {template.name}: {{{name}}} has no value here; it is not a template for this agent")


def _fill(
    template: Template, values: Mapping[str, Sequence[str | HashedImage]], images: Sequence[HashedImage]
) -> Message:
    """The template with every placeholder replaced, in one pass, and each image in its place, or all of them first;
    neighboring texts are joined."""
    if template.num_places not in (0, len(images)):
        what = f"template {template.name} has places for {template.num_places} images, and {len(images)} are given"
        raise BackendError("refused", what)
    parts: list[str | HashedImage] = [] if template.num_places else [*images]
    for part in _parts(template, values, iter(images)):
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        elif part != "":
            parts.append(part)
    return tuple(parts)


def _parts(
    template: Template, values: Mapping[str, Sequence[str | HashedImage]], images: Iterator[HashedImage]
) -> Iterator[str | HashedImage]:
    for index, piece in enumerate(PLACEHOLDER.split(template.text)):
        if index % 2:
            yield from (escape_control_tokens(v) if isinstance(v, str) else v for v in values[piece])
            continue
        first, *rest = piece.split(IMAGE_MARKER)
        yield first
        for text in rest:
            yield next(images)
            yield text


def nearest_prompt(template: Template, shown: str) -> str:
    """The prompt of run time that is nearest to `shown`; in both, `<image>` stands for an image.

    It is the template with the words that `shown` has in the places of its placeholders, filled in as `render_planner`
    and `render_critic` do: equal to `shown` just where they can make it.  Otherwise the two differ first where `shown`
    leaves what they can make; of the template no more follows than the text up to the next placeholder.
    """
    first, *others = PLACEHOLDER.split(template.text)
    is_critic, num_leading = "original_instruction" in template.placeholders, 0
    if not template.num_places and (first or is_critic):  # else the images are among the words
        any_number = itertools.takewhile(lambda number: shown.startswith(IMAGE_MARKER * number), itertools.count(1))
        num_leading = 2 if is_critic else len([*any_number])
    first = IMAGE_MARKER * num_leading + first
    with_images = {"story"} if num_leading or template.num_places else {"story", "text_input"}
    if not shown.startswith(first):
        return first
    made, rest, values = first, shown[len(first) :], dict[str, str]()
    for index in range(0, len(others), 2):
        name, literal = others[index : index + 2]
        end = _find_end(rest, literal, is_last=index + 2 == len(others))
        value = values.setdefault(name, rest[:end])
        if name == "rewritten_prompt" and not value:
            value = values.get("original_instruction", "")
        parts = value.split(IMAGE_MARKER) if name in with_images else [value]
        made += IMAGE_MARKER.join(map(escape_control_tokens, parts)) + literal
        if not rest.startswith(literal, end):
            break
        rest = rest[end + len(literal) :]
    return made


def _find_end(rest: str, literal: str, *, is_last: bool) -> int:
    """Where the words of a placeholder end, which `literal` follows, or else as much of its beginning as there is."""
    if is_last and rest.endswith(literal):
        return len(rest) - len(literal)
    size = bisect.bisect_left(range(1, len(literal) + 1), True, key=lambda size: literal[:size] not in rest)
    if not size:
        return len(rest)
    return rest.rindex(literal[:size]) if is_last else rest.index(literal[:size])


def render_plan(plan: Plan) -> str:
    """The answer the planner is taught; `parsing.parse_plan` gives the plan back."""
    return _answer(plan.reasoning, plan_object(plan))


def plan_object(plan: Plan) -> dict[str, Any]:
    """The object in the answer."""
    steps = [
        {
            "step_number": step.index,
            "step_name": step.name,
            "instruction": step.instruction,
            "prompt": step.prompt,
            "auxiliary_text": step.text,
        }
        for step in plan.steps
    ]
    return {"execution_plan": steps}


def render_verdict(verdict: Verdict) -> str:
    """The answer the critic is taught; `parsing.parse_verdict` gives the verdict back."""
    return _answer(
        verdict.reasoning, {"previous_step_success": verdict.success, "refine_prompt": verdict.refined_prompt}
    )


def _answer(reasoning: str, value: Mapping[str, Any]) -> str:
    # Twice, since a "<" that ends the text only once white space is gone would stand before the tag.
    thought = escape_control_tokens(escape_control_tokens(reasoning).strip())
    return f"<think>{thought}</think><answer>{safe_json(value)}</answer>"


def without_reasoning(answer: str) -> str:
    """What follows `</think>` in an answer; all of one that has none."""
    _, closed, said = answer.partition("</think>")
    return said.lstrip() if closed else answer


def safe_json(value: Mapping[str, Any]) -> str:
    """One line of JSON in which no control token or tag can be read: what may open one is written as an escape."""
    text = json.dumps(value, ensure_ascii=False)
    # In what json.dumps writes, "<" occurs in strings only, and "[" followed by a letter or a slash too.
    return OPENING.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
