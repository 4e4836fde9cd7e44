"""Every prompt the agents read and every answer they are taught, made in one place for training and run time alike.

What a user or a model wrote goes into a template through `escape_control_tokens`: no tokenizer reads a control token
out of it, no template a placeholder, no reader of an answer a tag.  Records keep the text as it was given.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from imgen_common.errors import UserError, nearest
from imgen_common.files import local_path, read_text
from interleave.protocols import CriticInput, HashedImage, Message
from interleave.records import Plan, Verdict

BUILTIN = (
    "planner_text planner_images critic critic_story judge_semantics judge_quality shapes_planner shapes_critic "
    "rational_rewards_edit rational_rewards_t2i"
).split()
PLACEHOLDERS = (
    *("text_input", "original_instruction", "rewritten_prompt", "request", "story", "image_before", "image_after"),
)
IMAGE_PLACEHOLDERS = ("image_before", "image_after")
"""Where a template of RationalRewards shows its images; all others show them before the text."""
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
IMAGE_MARKER = "<image>"

JOINER = "\u2060"
"""WORD JOINER: no width, no line break, in no tokenizer's control tokens."""
OPENING = re.compile(r"(?:<(?=[<|/_A-Za-z\uff5c]|\Z)|\[(?=[/A-Za-z]|\Z))")
"""Where a control token may begin: <|im_end|>, <think>, </s>, <<SYS>>, <image>, [INST], [/INST]; also at the very end,
where the next piece of text may complete it."""
CONTROL_TOKEN = re.compile(
    r"<image>|<\|[^\s<>|]{1,64}\|>|<\uff5c[^\s<>\uff5c]{1,64}\uff5c>"
    r"|</s>|<(?:bos|eos|pad)>|<(?:start|end)_of_turn>|\[/?INST\]"
)
"""What a reader of rows takes for an image, or a tokenizer for an image or the end of a turn, wherever it occurs."""
UNREADABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Template:
    """A prompt with placeholders such as `{text_input}`; all other braces mean themselves."""

    name: str
    text: str

    @property
    def hash(self) -> str:
        """sha256 (hex) of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def placeholders(self) -> frozenset[str]:
        """Their names."""
        return frozenset(PLACEHOLDER.findall(self.text))


def load_template(ref: str) -> Template:
    """The built-in template of that name, or the one in a text file of the user's; white space at the ends is removed.

    Raises UserError if there is none, it is not UTF-8, empty, or holds an unknown placeholder or a control token.
    """
    if ref in BUILTIN:
        text = (resources.files("interleave.agents") / "templates" / f"{ref}.txt").read_text(encoding="utf-8")
        return Template(ref, text.strip())
    path = local_path(ref)
    if path.suffix != ".txt":
        allowed = f"{', '.join(BUILTIN)} or the path of a .txt file"
        raise UserError(f"template {ref!r}: unknown{nearest(ref, BUILTIN)}; allowed: {allowed}")
    found = Template(ref, read_text(path).strip())
    for name in sorted(found.placeholders - set(PLACEHOLDERS)):
        allowed = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
        raise UserError(
            f"template {found.name}: unknown placeholder {{{name}}}{nearest(name, PLACEHOLDERS)}; allowed: {allowed}"
        )
    if not found.placeholders:
        raise UserError(f"template {found.name}: no placeholder in it, so every prompt would be the same; add one")
    if token := CONTROL_TOKEN.search(found.text):
        raise UserError(
            f"template {found.name}: remove {token[0]}; images are put before the text, in the order shown, or, for "
            "critic.kind: rational_rewards, where {image_before} and {image_after} stand, and turns are made by the "
            "model's chat template"
        )
    return found


def escape_control_tokens(text: str) -> str:
    """`text` without control tokens for any tokenizer; it reads the same, and escaping it again changes nothing.

    - A zero-width WORD JOINER follows each `<` or `[` that may open a control token or tag, so that `<|im_end|>`,
      `<|image_pad|>`, `<image>`, `</think>` or `[INST]` are spelled out letter by letter.
    - Control characters but tab and line feed become spaces, other ends of lines line feeds, and halves of surrogate
      pairs, which no UTF-8 text can hold, U+FFFD.
    Braces need no care, since placeholders are filled in one pass.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = SURROGATE.sub("\ufffd", UNREADABLE.sub(" ", text))
    return OPENING.sub(lambda match: match[0] + JOINER, text)


def render_planner(template: Template, text: str, images: Sequence[HashedImage]) -> Message:
    """What the planner reads: the request's images in their order, then the template with its text.

    Raises UserError if the template is not a planner's.
    """
    _expect(template, {"text_input"}, {"text_input"})
    return (*images, *_fill(template, {"text_input": [text]}))


def render_critic(template: Template, shown: CriticInput) -> Message:
    """What the critic reads: the image before, the image after, then the template.

    An empty `prompt_used` means the original prompt.  `{story}` becomes the words and images accepted so far, in
    place.  Raises UserError if the template is not a critic's.
    """
    allowed = set(PLACEHOLDERS) - {"text_input", *IMAGE_PLACEHOLDERS}
    _expect(template, {"original_instruction", "rewritten_prompt"}, allowed)
    story: list[str | HashedImage] = []
    for words, image in shown.story:
        story += [words, "\n"] if image is None else [words, "\n", image, "\n"]
    values: dict[str, Sequence[str | HashedImage]] = {
        "original_instruction": [shown.original_prompt],
        "rewritten_prompt": [shown.prompt_used or shown.original_prompt],
        "request": [shown.request],
        "story": story or ["nothing yet"],
    }
    return (shown.before, shown.after, *_fill(template, values))


def render_rational_rewards(template: Template, shown: CriticInput) -> Message:
    """What RationalRewards reads: the template, with each image where its placeholder stands.

    The image before is shown for an edit only.  The instruction is what was asked, as in the scripts of its authors.
    Raises UserError if the template is not one for this.
    """
    values: dict[str, Sequence[str | HashedImage]] = {
        "original_instruction": [shown.original_prompt],
        "image_after": [shown.after],
    }
    if shown.is_edit:
        values["image_before"] = [shown.before]
    _expect(template, set(values), set(values))
    return tuple(_fill(template, values))


def render_judge(template: Template, instruction: str, images: Sequence[HashedImage]) -> Message:
    """What a judge reads: the images, then the template; `instruction` is what was asked, never the critic's words.

    Raises UserError if the template is not a judge's.
    """
    _expect(template, set(), {"original_instruction"})
    return (*images, *_fill(template, {"original_instruction": [instruction]}))


def _expect(template: Template, needed: set[str], allowed: set[str]) -> None:
    for name in sorted(needed - template.placeholders):
        raise UserError(f"template {template.name}: {{{name}}} is missing; it is not a template for this agent")
    for name in sorted(template.placeholders - allowed):
        raise UserError(f"template {template.name}: {{{name}}} has no value here; it is not a template for this agent")


def _fill(template: Template, values: Mapping[str, Sequence[str | HashedImage]]) -> list[str | HashedImage]:
    """The template with every placeholder replaced, in one pass; neighboring texts are joined."""
    parts: list[str | HashedImage] = []
    for index, piece in enumerate(PLACEHOLDER.split(template.text)):
        filled = (
            [escape_control_tokens(v) if isinstance(v, str) else v for v in values[piece]] if index % 2 else [piece]
        )
        for part in filled:
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            elif part != "":
                parts.append(part)
    return parts


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


def safe_json(value: Mapping[str, Any]) -> str:
    """One line of JSON in which no control token or tag can be read: what may open one is written as an escape."""
    text = json.dumps(value, ensure_ascii=False)
    # In what json.dumps writes, "<" occurs in strings only, and "[" followed by a letter or a slash too.
    return OPENING.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
