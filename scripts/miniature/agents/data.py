"""What the miniature's agents are taught: requests with their plans, pictures with their verdicts, as rows of TRL.

The critic's reasoning reads both pictures in a fixed form, says of each thing that the instruction wants whether the
picture has it, and concludes:

    before: red circle d g. after: (blue cross) m f, (red circle) d g. want: (blue square) wrong, (red circle) asked.
    wrong things

Things stand in order of their names, each with its column and row (sixteen each, `models.PLACES`).  What is wanted and
what the new picture shows have names of one token each (`models.NAMES`), which nothing else in the report has: whether
a wanted thing is there is a matter of equal tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imgen_common.images import to_pil
from imgen_common.shapes.scene import SIZE
from imgen_common.shapes.steps import Story
from imgen_common.shapes.verify import Detection, detect
from interleave.agents.prompts import load_template, render_critic, render_plan, render_planner, render_verdict
from interleave.datasets.teachers import plan_of
from interleave.models.chat.conversation import to_conversation
from interleave.protocols import CriticInput, HashedImage, Message
from interleave.records import Verdict


def planner_message(request: str) -> Message:
    """What the planner reads."""
    return render_planner(load_template("shapes_planner"), request, ())


def planner_row(story: Story) -> dict[str, Any]:
    """One row of supervised data."""
    return _row(planner_message(story.request), render_plan(plan_of(story)))


def _row(message: Message, answer: str) -> dict[str, Any]:
    """prompt, completion and images; a picture in the prompt is a placeholder, in the order of `images`."""
    turn = to_conversation(message)[0]
    images = [part["image"] for part in turn["content"] if part["type"] == "image"]
    content = [{"type": "image"} if part["type"] == "image" else part for part in turn["content"]]
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": content}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
    }
    return row | ({"images": images} if images else {})


# --- critic ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One look of the critic: pictures as uint8 (3, 32, 32) (`before` None: the white one) and the two prompts."""

    before: Tensor | None
    after: Tensor
    original: str
    used: str


def readings(cases: Sequence[Case]) -> list[tuple[list[Detection] | None, list[Detection]]]:
    """What the verifier reads in each case's pictures, before and after."""
    pictures = [p for case in cases for p in (case.before, case.after) if p is not None]
    found = iter(detect(torch.stack(pictures).float() / 255))
    return [(None if case.before is None else next(found), next(found)) for case in cases]


def to_picture(pixels: Tensor | None) -> HashedImage:
    """A uint8 picture (3, 32, 32), or the white one."""
    if pixels is None:
        return HashedImage.from_pil(Image.new("RGB", (SIZE, SIZE), "white"))
    return HashedImage.from_pil(to_pil(pixels[None].float() / 255)[0])


def critic_message(case: Case) -> Message:
    """What the critic reads."""
    look = CriticInput(to_picture(case.before), to_picture(case.after), case.original, case.used)
    return render_critic(load_template("shapes_critic"), look)


def critic_row(case: Case, verdict: Verdict) -> dict[str, Any]:
    """One row of supervised data."""
    return _row(critic_message(case), render_verdict(verdict))
