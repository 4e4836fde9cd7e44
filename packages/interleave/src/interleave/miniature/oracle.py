"""Critic and judge that know: the shapes world's verifier behind the loop's Protocols."""

from imgen_common.images import from_pil
from imgen_common.shapes.scene import Thing
from imgen_common.shapes.stories import Step, read_prompt, step_holds
from imgen_common.shapes.verify import Detection, detect
from interleave.parts import CriticAnswer, Look, Picture
from interleave.records import Scores, Verdict


def things_in(picture: Picture) -> list[Detection]:
    """What the verifier reads in a picture of the world (32x32 pixels)."""
    return detect(from_pil([picture.image]))[0]


def is_blank(picture: Picture) -> bool:
    """Whether it is the white picture that stands before a story's first."""
    return picture.image.getextrema() == ((255, 255), (255, 255), (255, 255))


def asked_of(look: Look) -> tuple[list[Detection] | None, Step | None]:
    """What the picture before shows (None: blank), and the step that the original prompt asks for, if it says one."""
    before = None if is_blank(look.before) else things_in(look.before)
    things: tuple[Thing, ...] | None = None if before is None else tuple(found.thing for found in before)
    return before, read_prompt(look.original_prompt, things)


def holds(look: Look) -> bool:
    """Whether the picture after is what the step's prompt asks for, given the picture before."""
    before, step = asked_of(look)
    return step is not None and step_holds(before, things_in(look.after), step)


class VerifierCritic:
    """The best verdict there is; it never rewrites, so that what it gains is due to the verdict alone."""

    @property
    def id(self) -> str:
        return "verifier"

    async def judge(self, look: Look, seed: int) -> CriticAnswer:
        """Success where the verifier says so; the prompt stays."""
        verdict = Verdict(success=holds(look), refined_prompt=look.prompt_used or look.original_prompt)
        return CriticAnswer(verdict, raw="")

    async def close(self) -> None:
        """Nothing to let go of."""


class VerifierJudge:
    """The miniature's judge: `sc` 10 where the step holds, else the share of what was asked that is there; `pq` the
    share of what is there that is a thing of the world."""

    @property
    def id(self) -> str:
        return "verifier"

    async def score(self, look: Look) -> Scores:
        """Scores of the picture after."""
        before, step = asked_of(look)
        found = things_in(look.after)
        clean = [d for d in found if d.thing.colour != "mixed" and d.thing.shape != "blob"]
        pq = 10 * len(clean) / len(found) if found else 0.0
        if step is None:
            return Scores(sc=0, pq=pq, judge_id=self.id)
        if step_holds(before, found, step):
            return Scores(sc=10, pq=pq, judge_id=self.id)
        want, got = list(step.after), [d.thing for d in found]
        shared = sum(min(want.count(thing), got.count(thing)) for thing in set(want))
        return Scores(sc=8 * shared / max(len(want), len(got)), pq=pq, judge_id=self.id)

    async def close(self) -> None:
        """Nothing to let go of."""
