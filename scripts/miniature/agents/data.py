"""The training data of the miniature's agents: requests with plans, images with verdicts, as rows of TRL.

The critic's reasoning describes both images in a fixed form, states for each wanted thing whether the new image has
it, and concludes:

    before: red circle d g. after: (blue cross) m f, (red circle) d g. want: (blue square) wrong, (red circle) asked.
    wrong things

Things are in the order of their names, each with its column and row (sixteen of each, `teachers.PLACES`).  The names of
wanted things and of those in the new image are one token each (`models.NAMES`), which occur nowhere else in the report:
a wanted thing is there if the tokens are equal.
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
from interleave.datasets.teachers import make_plan
from interleave.models.chat.local import to_conversation
from interleave.protocols import CriticInput, HashedImage, Message
from interleave.records import Verdict


def planner_message(request: str) -> Message:
    """The message to the planner."""
    return render_planner(load_template("shapes_planner"), request, ())


def planner_row(story: Story) -> dict[str, Any]:
    """One row of supervised data."""
    return make_row(planner_message(story.request), render_plan(make_plan(story)))


def make_row(message: Message, answer: str) -> dict[str, Any]:
    """prompt, completion and images; images of the prompt are placeholders, in the order of `images`."""
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
    """One input of the critic.

    before, after: images as uint8 (3, 32, 32); None stands for the white image.  original, used: the two prompts.
    """

    before: Tensor | None
    after: Tensor
    original: str
    used: str


def read_cases(cases: Sequence[Case]) -> list[tuple[list[Detection] | None, list[Detection]]]:
    """The things that the verifier detects in the images of each case, before and after."""
    images = [p for case in cases for p in (case.before, case.after) if p is not None]
    found = iter(detect(torch.stack(images).float() / 255))
    return [(None if case.before is None else next(found), next(found)) for case in cases]


def to_hashed_image(pixels: Tensor | None) -> HashedImage:
    """A uint8 image (3, 32, 32), or the white one."""
    if pixels is None:
        return HashedImage.from_pil(Image.new("RGB", (SIZE, SIZE), "white"))
    return HashedImage.from_pil(to_pil(pixels[None].float() / 255)[0])


def critic_message(case: Case) -> Message:
    """The message to the critic."""
    shown = CriticInput(to_hashed_image(case.before), to_hashed_image(case.after), case.original, case.used)
    return render_critic(load_template("shapes_critic"), shown)


def critic_row(case: Case, verdict: Verdict) -> dict[str, Any]:
    """One row of supervised data."""
    return make_row(critic_message(case), render_verdict(verdict))
