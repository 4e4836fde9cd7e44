"""Sampling of tokens in which each row of a batch has a random stream of its own."""

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from imgen_common.streams import torch_generator


class GumbelSampler(LogitsProcessor):
    """A logits processor under which the most probable token is an exact sample.

    Adds Gumbel noise (arg max of log p + Gumbel noise is a sample of p) from a stream of each row's own, named by its
    seed; repetition_penalty (of a model's own configuration), temperature, top_k and top_p apply before.  Temperature 0
    adds none.  Keeps the alternatives' probabilities as the model gave them.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        device: torch.device,
        *,
        temperature: float,
        top_p: float,
        top_k: int,
        top_logprobs: int,
        repetition_penalty: float = 1.0,
    ) -> None:
        self._top_logprobs = top_logprobs
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._streams = [torch_generator(seed, "tokens", device=device) for seed in seeds]
        self._is_random = temperature > 0
        self._warpers: list[LogitsProcessor] = []
        if repetition_penalty != 1:
            self._warpers.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
        if self._is_random:
            self._warpers.append(TemperatureLogitsWarper(temperature))
            if top_k:
                self._warpers.append(TopKLogitsWarper(top_k))
            if top_p < 1:
                self._warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._top_logprobs:
            top = scores.float().softmax(-1).topk(min(self._top_logprobs, scores.shape[-1]))
            self._steps.append((top.indices.cpu(), top.values.cpu()))
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        if self._is_random:
            noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
            for row, stream in zip(noise, self._streams, strict=True):
                row.exponential_(generator=stream).clamp_min_(torch.finfo(torch.float32).tiny)
            scores = scores.float() - noise.log()
        return scores

    def alternatives(self, row: int) -> list[dict[int, float]]:
        """The most probable tokens of each step and their probabilities."""
        return [dict(zip(indices[row].tolist(), values[row].tolist(), strict=True)) for indices, values in self._steps]
