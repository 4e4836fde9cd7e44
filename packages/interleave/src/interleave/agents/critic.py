"""The critic over any chat model."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from PIL import Image

from imgen_common.errors import UserError
from imgen_common.streams import stream_seed
from interleave.agents.parsing import ParseFailure, ParseMode, describe_failure, parse_verdict
from interleave.agents.prompts import Template, render_critic
from interleave.protocols import ChatModel, CriticAnswer, CriticInput, HashedImage, Reply
from interleave.records import Verdict

Context = Literal["pair", "story"]
VERDICT = re.compile(r"""previous_step_success['"]\s*:\s*""")
"""What stands before the verdict, in JSON or as Python writes it."""
NOT_OF_A_WORD = " \t\n:'\"Ġ▁"


class ChatCritic:
    """Shows a chat model the images before and after; with context `story` also the request and the story so far.

    Of several samples those that cannot be read do not count.  An image is accepted where at least the share
    `acceptance_threshold` of the others accepts it (self-consistency); the verdict's words are those of the first one
    that says so.
    """

    def __init__(
        self,
        model: ChatModel,
        template: Template,
        context: Context = "pair",
        parse_mode: ParseMode = "strict",
        num_samples: int = 1,
        acceptance_threshold: float = 0.5,
    ) -> None:
        """Raises UserError for a template that is not a critic's, or not one for this context."""
        white = HashedImage.from_pil(Image.new("RGB", (1, 1), "white"))
        render_critic(template, CriticInput(white, white, "", ""))
        shows_story = bool(template.placeholders & {"request", "story"})
        if shows_story != (context == "story"):
            has = "shows the request or the story" if shows_story else "has neither {request} nor {story}"
            remedy = f"set context to {'story' if shows_story else 'pair'} or choose another"
            raise UserError(f"critic.context: {context}, but template {template.name} {has}; {remedy}")
        self.model = model
        self._template, self._context, self._policy = template, context, parse_mode
        self._num_samples, self._accept_share = num_samples, acceptance_threshold

    @property
    def id(self) -> str:
        """The model's, with how many samples of it decide."""
        return self.model.id if self._num_samples == 1 else f"{self.model.id} x{self._num_samples}"

    async def judge(self, shown: CriticInput, seed: int) -> CriticAnswer:
        """The verdict, or why its answer cannot be read.  Raises BackendError."""
        seen = shown
        if self._context == "pair":
            seen = CriticInput(shown.before, shown.after, shown.original_prompt, shown.prompt_used)
        message = render_critic(self._template, seen)
        seeds = [seed, *(stream_seed(seed, "critic-sample", i) for i in range(1, self._num_samples))]
        replies = await asyncio.gather(*(self.model.chat(message, each) for each in seeds))
        read = [(reply, parse_verdict(reply.text, self._policy)) for reply in replies]
        said = [(reply, verdict) for reply, verdict in read if not isinstance(verdict, ParseFailure)]
        if not said:
            reply, why = read[0]
            assert isinstance(why, ParseFailure)
            return CriticAnswer(None, reply.text, describe_failure(reply, why))
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
        """Release the model."""
        await self.model.close()


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
