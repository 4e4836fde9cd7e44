"""Planner and critic over any chat model."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from PIL import Image

from imgen_common.errors import UserError
from imgen_common.streams import stream_key
from interleave.parsing import Policy, Unreadable, parse_plan, parse_verdict
from interleave.parts import ChatModel, CriticAnswer, Look, Picture, PlannerAnswer, Reply
from interleave.prompts import Template, render_critic, render_planner
from interleave.records import Request, Verdict

Context = Literal["pair", "story"]
VERDICT = re.compile(r"""previous_step_success['"]\s*:\s*""")
"""What stands before the verdict, in JSON or as Python writes it."""
NOT_OF_A_WORD = " \t\n:'\"Ġ▁"


class ChatPlanner:
    """Asks a chat model once per call; one template for requests with pictures, one for those without."""

    def __init__(self, model: ChatModel, text: Template, pictures: Template, policy: Policy = "strict") -> None:
        """Raises UserError for a template that is not a planner's."""
        for template in (text, pictures):
            render_planner(template, "", [])
        self.model = model
        self._text, self._pictures, self._policy = text, pictures, policy

    @property
    def id(self) -> str:
        """The model's."""
        return self.model.id

    async def plan(self, request: Request, pictures: Sequence[Picture], seed: int) -> PlannerAnswer:
        """The plan, or why its answer cannot be read.  Raises PartFailed."""
        template = self._pictures if pictures else self._text
        reply = await self.model.chat(render_planner(template, request.text, pictures), seed)
        read = parse_plan(reply.text, self._policy)
        about = {"raw": reply.text, "template": template.name, "template_hash": template.hash}
        if isinstance(read, Unreadable):
            return PlannerAnswer(None, error=_why(reply, read), **about)
        return PlannerAnswer(read, **about)

    async def close(self) -> None:
        """Let go of the model."""
        await self.model.close()


class ChatCritic:
    """Shows a chat model the pictures before and after; with context `story` also the request and the story so far.

    Of several samples those that cannot be read do not count.  A picture is accepted where at least `accept_share` of
    the others accept it (self-consistency); the verdict's words are those of the first one that says so.
    """

    def __init__(
        self,
        model: ChatModel,
        template: Template,
        context: Context = "pair",
        policy: Policy = "strict",
        num_samples: int = 1,
        accept_share: float = 0.5,
    ) -> None:
        """Raises UserError for a template that is not a critic's, or not one for this context."""
        white = Picture.of(Image.new("RGB", (1, 1), "white"))
        render_critic(template, Look(white, white, "", ""))
        tells = bool(template.placeholders & {"request", "story"})
        if tells != (context == "story"):
            has = "shows the request or the story" if tells else "has neither {request} nor {story}"
            remedy = f"set context to {'story' if tells else 'pair'} or choose another"
            raise UserError(f"critic.context: {context}, but template {template.name} {has}; {remedy}")
        self.model = model
        self._template, self._context, self._policy = template, context, policy
        self._num_samples, self._accept_share = num_samples, accept_share

    @property
    def id(self) -> str:
        """The model's, with how many samples of it decide."""
        return self.model.id if self._num_samples == 1 else f"{self.model.id} x{self._num_samples}"

    async def judge(self, look: Look, seed: int) -> CriticAnswer:
        """The verdict, or why its answer cannot be read.  Raises PartFailed."""
        shown = look
        if self._context == "pair":
            shown = Look(look.before, look.after, look.original_prompt, look.prompt_used)
        message = render_critic(self._template, shown)
        seeds = [seed, *(stream_key(seed, "critic-sample", i) % 2**31 for i in range(1, self._num_samples))]
        replies = await asyncio.gather(*(self.model.chat(message, each) for each in seeds))
        read = [(reply, parse_verdict(reply.text, self._policy)) for reply in replies]
        said = [(reply, verdict) for reply, verdict in read if not isinstance(verdict, Unreadable)]
        if not said:
            reply, why = read[0]
            assert isinstance(why, Unreadable)
            return CriticAnswer(None, reply.text, _why(reply, why))
        success = sum(verdict.success for _, verdict in said) >= self._accept_share * len(said)
        reply, verdict = next((reply, verdict) for reply, verdict in said if verdict.success == success)
        return CriticAnswer(verdict, reply.text, success_probability=self._probability(said))

    def _probability(self, said: Sequence[tuple[Reply, Verdict]]) -> float | None:
        """The mean of `success_probability`; of several samples one that has none counts as 0 or 1."""
        known = [success_probability(reply) for reply, _ in said]
        if self._num_samples == 1:
            return known[0]
        return float(np.mean([float(v.success) if p is None else p for p, (_, v) in zip(known, said, strict=True)]))

    async def close(self) -> None:
        """Let go of the model."""
        await self.model.close()


def _why(reply: Reply, read: Unreadable) -> str:
    cut = f"cut off after {reply.num_completion_tokens} tokens: " if reply.truncated else ""
    return cut + read.reason


def success_probability(reply: Reply) -> float | None:
    """How much probability the model gave to `true` against `false` where it wrote its verdict, in [0, 1].

    None where the reply has no probabilities, or neither word was likely.  The last verdict counts, as in `parsing`.
    """
    places = list(VERDICT.finditer("".join(token for token, _ in reply.token_probabilities)))
    end = 0
    for token, alternatives in reply.token_probabilities if places else ():
        end += len(token)
        if end > places[-1].end():
            yes, no = (_mass(alternatives, word) for word in ("true", "false"))
            return yes / (yes + no) if yes + no > 0 else None
    return None


def _mass(alternatives: Mapping[str, float], word: str) -> float:
    """Of the tokens that are the word or begin it."""
    said = ((token.strip(NOT_OF_A_WORD).lower(), p) for token, p in alternatives.items())
    return sum(p for token, p in said if token and (word.startswith(token) or token.startswith(word)))
