"""Parts that know nothing, against which the real ones are measured."""

from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from interleave.protocols import CriticAnswer, CriticInput
from interleave.records import Verdict

Probability = Annotated[float, Ge(0), Le(1)]


class RandomRewrite:
    """A critic that does not shown: it accepts with a given probability and rewrites by adding a random phrase.

    What a real critic gains over it, at equal images, is due to its looking and not to further tries or longer
    prompts.
    """

    def __init__(self, accept: Probability, phrases: tuple[str, ...]) -> None:
        """phrases: what may be added to the step's prompt; an empty one leaves it as it is."""
        self._accept, self._phrases = accept, phrases

    @property
    def id(self) -> str:
        return f"random_rewrite({self._accept})"

    async def judge(self, shown: CriticInput, seed: int) -> CriticAnswer:
        """Depends on `seed` alone."""
        rng = np.random.default_rng(seed)
        success = bool(rng.random() < self._accept)
        phrase = self._phrases[rng.integers(len(self._phrases))]
        refined = shown.prompt_used if success else " ".join(filter(None, (shown.original_prompt, phrase)))
        return CriticAnswer(Verdict(success=success, refined_prompt=refined, reasoning="chance"), raw="")

    async def close(self) -> None:
        pass
