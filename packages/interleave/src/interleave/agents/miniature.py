"""Critic and judge that know: the shapes world's verifier behind the loop's Protocols."""

from collections import Counter

from imgen_common.images import from_pil
from imgen_common.shapes.steps import Step
from imgen_common.shapes.stories import read_prompt, step_holds
from imgen_common.shapes.verify import Detection, detect
from interleave.protocols import CriticAnswer, CriticInput, HashedImage
from interleave.records import Scores, Verdict


def detect_things(image: HashedImage) -> list[Detection]:
    """What the verifier reads in an image of the world (32x32 pixels)."""
    return detect(from_pil([image.image]))[0]


def is_blank(image: HashedImage) -> bool:
    """Whether it is the white image that stands before a story's first."""
    return image.image.getextrema() == ((255, 255), (255, 255), (255, 255))


def read_question(shown: CriticInput) -> tuple[list[Detection] | None, Step | None]:
    """What the image before shows (None: blank), and the step that the original prompt asks for, if it says one."""
    before = None if is_blank(shown.before) else detect_things(shown.before)
    return before, read_prompt(shown.original_prompt, None if before is None else [found.thing for found in before])


class VerifierCritic:
    """The best verdict there is; it never rewrites, so that what it gains is due to the verdict alone."""

    id = "verifier"

    async def judge(self, shown: CriticInput, seed: int) -> CriticAnswer:
        """Success where the image after is what the step's prompt asks for, given the image before."""
        before, step = read_question(shown)
        success = step is not None and step_holds(before, detect_things(shown.after), step)
        verdict = Verdict(success=success, refined_prompt=shown.prompt_used or shown.original_prompt)
        return CriticAnswer(verdict, raw="")

    async def close(self) -> None:
        """Nothing to release."""


class VerifierJudge:
    """The miniature's judge: `semantics` is 10 where the step holds, else at most 8 by the share of what was asked that
    is there; `quality` is the share of what is there that is a thing of the world."""

    id = "verifier"

    async def score(self, shown: CriticInput) -> Scores:
        """Scores of the image after."""
        before, step = read_question(shown)
        found = detect_things(shown.after)
        clean = [d for d in found if d.thing.colour != "mixed" and d.thing.shape != "blob"]
        quality = 10 * len(clean) / len(found) if found else 0.0
        if step is None:
            semantics = 0.0
        elif step_holds(before, found, step):
            semantics = 10.0
        else:
            wanted, shared = Counter(step.after), Counter(step.after) & Counter(d.thing for d in found)
            semantics = 8 * shared.total() / max(wanted.total(), len(found))
        return Scores(semantics=semantics, quality=quality, judge_id=self.id)

    async def close(self) -> None:
        """Nothing to release."""
