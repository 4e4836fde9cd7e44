"""The critic over any chat model, RationalRewards as a critic, and one that decides by chance, as a control."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from imgen_common.errors import UserError
from imgen_common.judging.objects import ParseMode
from imgen_common.streams import stream_seed
from interleave.agents.parsing import ParseFailure, describe_failure, parse_verdict
from interleave.agents.prompts import Template, render_critic, render_rational_rewards
from interleave.agents.rational_rewards import EDIT_ASPECTS, T2I_ASPECTS, parse_critique
from interleave.models.concurrency import map_concurrently
from interleave.protocols import BackendError, ChatModel, CriticAnswer, CriticInput, HashedImage, Message, Reply
from interleave.records import Verdict

Context = Literal["pair", "story"]
VERDICT = re.compile(r"""previous_step_success['"]\s*:\s*""")
"""What stands before the verdict, in JSON or as Python writes it."""
NOT_OF_A_WORD = " \t\n:'\"Ġ▁"


class ChatCritic:
    """Shows a chat model the images before and after; with context `story` also the request and the story so far.

    Of several samples those that are refused or cannot be read do not count.  An image is accepted where at least the
    share `acceptance_threshold` of the others accepts it (self-consistency); the verdict's words are those of the first
    one that says so.
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
        white = HashedImage.white(1, 1)
        render_critic(template, CriticInput(white, white, "", ""))
        shows_story = bool(template.placeholders & {"request", "story"})
        if shows_story != (context == "story"):
            has = "shows the request or the story" if shows_story else "has neither {request} nor {story}"
            remedy = f"set context to {'story' if shows_story else 'pair'} or choose another"
            raise UserError(f"critic.context: {context}, but template {template.name} {has}; {remedy}")
        self.model, self.id = model, model.id if num_samples == 1 else f"{model.id} x{num_samples}"
        self._template, self._context, self._parse_mode = template, context, parse_mode
        self._num_samples, self._acceptance_threshold = num_samples, acceptance_threshold

    async def judge(self, shown: CriticInput, seed: int) -> CriticAnswer:
        """The verdict, or why its answer cannot be read.  Raises BackendError."""
        if self._context == "pair":
            shown = replace(shown, request="", story=())
        message = render_critic(self._template, shown)
        seeds = [seed, *(stream_seed(seed, "critic-sample", i) for i in range(1, self._num_samples))]
        given = await map_concurrently(lambda each: self._ask(message, each), seeds, len(seeds))
        replies = [reply for reply in given if isinstance(reply, Reply)]
        if not replies:
            raise next(one for one in given if isinstance(one, BackendError))
        read = [(reply, parse_verdict(reply.text, self._parse_mode)) for reply in replies]
        readable = [(reply, verdict) for reply, verdict in read if not isinstance(verdict, ParseFailure)]
        if not readable:
            reply, why = read[0]
            assert isinstance(why, ParseFailure)
            return CriticAnswer(None, reply.text, describe_failure(reply, why), finish_reason=reply.finish_reason)
        success = sum(verdict.success for _, verdict in readable) >= self._acceptance_threshold * len(readable)
        reply, verdict = next((reply, verdict) for reply, verdict in readable if verdict.success == success)
        known = [success_probability(reply) for reply, _ in readable]
        probability = known[0]
        if self._num_samples > 1:
            # Of several samples one that has no probability counts as 0 or 1
            certain = [float(v.success) if p is None else p for p, (_, v) in zip(known, readable, strict=True)]
            probability = float(np.mean(certain))
        return CriticAnswer(verdict, reply.text, None, probability, reply.finish_reason)

    async def _ask(self, message: Message, seed: int) -> "Reply | BackendError":
        """An answer; where it is refused, or cannot be read, that failure, since other samples may be answered."""
        try:
            return await self.model.chat(message, seed)
        except BackendError as error:
            if error.kind not in ("refused", "malformed_response"):
                raise
            return error

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
    tokens = ((token.strip(NOT_OF_A_WORD).lower(), p) for token, p in alternatives.items())
    return sum(p for token, p in tokens if token and (word.startswith(token) or token.startswith(word)))


class RubricCritic:
    """RationalRewards (arXiv 2604.11626) scores several aspects of an image from 1 to 4 and rewrites the prompt.

    One chat model judges edits, another one images made from words alone; both may be the same.  An image is accepted
    where no score is below `min_score`.
    """

    def __init__(
        self, edit: tuple[ChatModel, Template], t2i: tuple[ChatModel, Template], min_score: float = 3.0
    ) -> None:
        """min_score: in [1, 4].  Raises UserError for a template that is not one for this."""
        white = HashedImage.white(1, 1)
        for (_, template), is_edit in ((edit, True), (t2i, False)):
            render_rational_rewards(template, CriticInput(white, white, "", "", is_edit=is_edit))
        self._edit, self._t2i, self._min_score = edit, t2i, min_score
        self.models = (edit[0],) if edit[0] is t2i[0] else (edit[0], t2i[0])
        self.id = f"rational_rewards({' | '.join(model.id for model in self.models)}, {min_score:g})"

    async def judge(self, shown: CriticInput, seed: int) -> CriticAnswer:
        """The verdict, or why its answer cannot be read.  Raises BackendError."""
        model, template = self._edit if shown.is_edit else self._t2i
        reply = await model.chat(render_rational_rewards(template, shown), seed)
        critique = parse_critique(reply.text, EDIT_ASPECTS if shown.is_edit else T2I_ASPECTS)
        # Nothing ends the refined request, so that of an answer that was cut off may be half of one
        if reply.truncated and not isinstance(critique, ParseFailure):
            critique = ParseFailure("its last words may be missing")
        if not isinstance(critique, ParseFailure):
            verdict = critique.verdict(self._min_score, shown.prompt_used or shown.original_prompt)
            if not isinstance(verdict, ParseFailure):
                return CriticAnswer(verdict, reply.text, finish_reason=reply.finish_reason)
            critique = verdict
        return CriticAnswer(None, reply.text, describe_failure(reply, critique), finish_reason=reply.finish_reason)

    async def close(self) -> None:
        """Release the models."""
        for model in self.models:
            await model.close()


class RandomRewrite:
    """A critic that does not look: it accepts with a given probability and rewrites by adding a random phrase.

    What a real critic gains over it is due to its looking, not to further tries or longer prompts.
    """

    def __init__(self, accept: float, phrases: tuple[str, ...]) -> None:
        """phrases: what may be added to the step's prompt; an empty one leaves it as it is."""
        self._accept, self._phrases = accept, phrases
        self.id = f"random_rewrite({accept})"

    async def judge(self, shown: CriticInput, seed: int) -> CriticAnswer:
        """Depends on `seed` alone."""
        rng = np.random.default_rng(seed)
        success = bool(rng.random() < self._accept)
        phrase = self._phrases[rng.integers(len(self._phrases))]
        refined = shown.prompt_used if success else " ".join(filter(None, (shown.original_prompt, phrase)))
        return CriticAnswer(Verdict(success=success, refined_prompt=refined, reasoning="chance"), raw="")

    async def close(self) -> None:
        """Nothing to release."""
