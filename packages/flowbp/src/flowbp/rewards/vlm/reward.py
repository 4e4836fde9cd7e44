"""A vision-language model as a reward: it is shown source, prompt and image, and its answer is the score."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from flowbp.rewards.loading import prompt_of_each
from flowbp.rewards.vlm.model import AnswerBatch, EncodedImage, PromptBatch, VisionLanguageModel, precise
from flowbp.rewards.vlm.settings import (
    FILE,
    IMAGE,
    PLACE,
    PROMPT,
    SOURCE,
    GivenAnswer,
    SampledAnswer,
    TokenAnswer,
    VlmSettings,
)
from imgen_common.errors import UserError, one_line
from imgen_common.images import shape_problem
from imgen_common.judging.escaping import escape_control_tokens
from imgen_common.streams import numpy_generator

Sources = Sequence[Sequence[Float[Tensor, "3 _ _"]]]
"""The source images of each sample, of any sizes; perhaps none."""


class VlmReward:
    """The score of `VlmSettings.answer`, with a gradient to the pixels through the model's own preprocessing.

    Sampled answers: the score of an image x is (1/n) sum_i r_i, where r_i is 1 if answer a_i ~ p(a | x) accepts it and
    0 if not: an unbiased estimate of P(accept | x) = sum_a p(a | x) r(a).  Its gradient is that of P in expectation,

        grad P = E[(1/(n-1)) sum_i (r_i - mean r) grad log p(a_i | x)],

    REINFORCE with the mean of the other answers as baseline.  Images whose answers all agree have no gradient.  The
    random numbers that choose the answers follow from the prompt and, roughly, from the image and its sources, so that
    a resumed run, or one with other micro-batches, repeats them.
    """

    sees_sources = True

    def __init__(self, vlm: VisionLanguageModel, settings: VlmSettings) -> None:
        """Raises UserError for a template or answers that are not for this model."""
        self.vlm, self.settings = vlm, settings
        where = f"{vlm.model.name_or_path}: {FILE}"
        if token := vlm.special.search(settings.template):
            raise UserError(f"{where}: template: remove {token[0]}; turns are made by the model's chat template")
        self._ids = self._answer_tokens(where, settings.answer) if isinstance(settings.answer, TokenAnswer) else {}

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu") -> "VlmReward":
        """The frozen reward of a folder with a model of transformers and a `reward.json`.

        The model is float32 on a CPU and bfloat16 elsewhere, its layers are checkpointed.
        """
        settings = VlmSettings.load(folder)
        return cls(VisionLanguageModel.load(folder, device), settings)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UserError for a prompt whose image cannot be scored: it brings no answer, where answers are given, or
        a source image that is too long for the model."""
        sources = ((prompt, source) for prompt in prompts for source in getattr(prompt, "sources", ()))
        for prompt, source in sources if SOURCE in self.settings.template else ():
            height, width = source.size
            if problem := shape_problem(width, height):
                where = f"{self.vlm.model.name_or_path}: the source of {one_line(prompt, 60)!r}"
                raise UserError(f"{where} {problem}; cut it, or drop the row")
        if isinstance(self.settings.answer, GivenAnswer):
            _given_texts(self.settings.answer, prompts)

    def __call__(
        self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str], sources: Sources = ()
    ) -> Float[Tensor, " b"]:
        """Scores of images in [0, 1] for their prompts and source images."""
        prompts = prompt_of_each(prompts, images)
        shown = [self._shown_sources(i, images, sources) for i in range(len(images))]
        edited = self.vlm.encode_images([images])
        with torch.no_grad():
            given = [source[None] for each in shown for source in each]
            encoded = iter(self.vlm.encode_images(given) if given else ())
        before = [[next(encoded) for _ in each] for each in shown]
        texts = [self._render(prompt, len(each)) for prompt, each in zip(prompts, shown, strict=True)]
        match self.settings.answer:
            case TokenAnswer() as answer:
                return self._score_token(self._batch([text + answer.prefix for text in texts], before, edited), answer)
            case GivenAnswer() as answer:
                return self._score_given(self._batch(texts, before, edited), answer, prompts)
            case SampledAnswer() as answer:
                keys = [_key(text, [*each, image]) for text, each, image in zip(texts, shown, images, strict=True)]
                return self._score_sampled(answer, texts, before, edited, keys).to(images.dtype)

    def _shown_sources(self, index: int, images: Tensor, sources: Sources) -> list[Tensor]:
        """The sources of a sample that are shown with it."""
        if SOURCE not in self.settings.template:
            return []
        given = [source.to(images) for source in sources[index]] if sources else []
        if not given and self.settings.blank_source:
            return [torch.ones_like(images[index])]
        return given[-self.settings.max_sources :] if self.settings.max_sources else given

    def _render(self, prompt: str, num_sources: int) -> str:
        """The conversation about one image.  What a tokenizer would read as a special token is none in a prompt."""
        said = self.vlm.special.sub(" ", escape_control_tokens(prompt))
        filled: list[str | None] = []
        for part in PLACE.split(self.settings.template):
            if part in (IMAGE, SOURCE):
                filled += [None] * (1 if part == IMAGE else num_sources)
            else:
                text = said if part == PROMPT else part
                if filled and (last := filled[-1]) is not None:
                    filled[-1] = last + text
                elif text:
                    filled.append(text)
        return self.vlm.render(filled)

    def _batch(
        self, texts: Sequence[str], before: Sequence[Sequence[EncodedImage]], edited: Sequence[EncodedImage]
    ) -> PromptBatch:
        """The prompts with the images in the template's order."""
        template = self.settings.template
        is_first = template.find(IMAGE) < template.find(SOURCE)
        pairs = zip(before, edited, strict=True)
        return self.vlm.tokenize(texts, [[one, *each] if is_first else [*each, one] for each, one in pairs])

    # --- an answer of one token ---------------------------------------------------------------------------------------

    def _answer_tokens(self, where: str, answer: TokenAnswer) -> dict[str, int]:
        """The token of each answer.  Raises UserError for one that is none or several."""
        names = [answer.token, *answer.against] if answer.token is not None else [*answer.scale]
        ids = {name: self.vlm.token_ids(name) for name in names}
        for name, found in ids.items():
            if len(found) != 1:
                raise UserError(
                    f"{where}: answer {name!r} is {len(found)} tokens of this model; choose one that is a single token "
                    "(a space before it counts), or answer.kind sampled or given"
                )
        return {name: found[0] for name, found in ids.items()}

    def _score_token(self, prompts: PromptBatch, answer: TokenAnswer) -> Float[Tensor, " b"]:
        logits = self.vlm.next_logits(prompts)
        if answer.token is None:
            chosen = logits[:, [self._ids[name] for name in answer.scale]].softmax(-1)
            return chosen @ logits.new_tensor([*answer.scale.values()])
        wanted = logits[:, self._ids[answer.token]]
        if answer.against:
            return wanted - logits[:, [self._ids[name] for name in answer.against]].logsumexp(-1)
        others = torch.arange(logits.shape[-1], device=logits.device) != self._ids[answer.token]
        return wanted - logits.where(others, -torch.inf).logsumexp(-1)

    # --- an answer that is given --------------------------------------------------------------------------------------

    def _score_given(self, prompts: PromptBatch, answer: GivenAnswer, given: Sequence[str]) -> Float[Tensor, " b"]:
        texts = _given_texts(answer, given)
        ids = [[*self.vlm.token_ids(text), self.vlm.tokenizer.eos_token_id] for text in texts]
        length, device = max(map(len, ids)), prompts.ids.device
        padded = torch.tensor([one + [one[-1]] * (length - len(one)) for one in ids], device=device)
        lengths = torch.tensor([len(one) for one in ids], device=device)
        mask = torch.arange(length, device=device) < lengths[:, None]
        return self.vlm.log_likelihoods(prompts, AnswerBatch(padded, mask)) / lengths

    # --- answers that are sampled -------------------------------------------------------------------------------------

    def _score_sampled(
        self,
        answer: SampledAnswer,
        texts: Sequence[str],
        before: Sequence[Sequence[EncodedImage]],
        edited: Sequence[EncodedImage],
        keys: Sequence[int],
    ) -> Float[Tensor, " b"]:
        # the gradient at the states of images is computed here, a few answers at a time, so that no more than their
        # graph is held; the graph from the states to the pixels is the caller's
        leaves = [EncodedImage(one.grid, tuple(s.detach().requires_grad_() for s in one.states)) for one in edited]
        prompts = self._batch(texts, before, leaves)
        streams = [numpy_generator(key, "answer", i) for key in keys for i in range(answer.num_answers)]
        uniforms = np.stack([stream.random(answer.max_new_tokens) for stream in streams])
        said = self.vlm.sample(prompts, torch.from_numpy(uniforms).to(prompts.ids.device), answer.temperature)
        opened = ["<think>" if text.rstrip().endswith("<think>") else "" for text in texts]  # by the chat template
        words = self.vlm.decode(said)
        accepted = torch.tensor(
            [float(answer.accept.accepts(opened[i // answer.num_answers] + each)) for i, each in enumerate(words)],
            dtype=torch.float64,
            device=prompts.ids.device,
        ).unflatten(0, (len(texts), -1))
        rates = accepted.mean(1)
        if not (torch.is_grad_enabled() and any(s.requires_grad for one in edited for s in one.states)):
            return rates
        advantages = ((accepted - rates[:, None]) / (answer.num_answers - 1)).flatten()
        gradients = self._state_gradients(answer, prompts, said, advantages, leaves)
        # linear in the states, with that gradient
        pairs = (zip(one.states, found, strict=True) for one, found in zip(edited, gradients, strict=True))
        linear = torch.stack([torch.cat([(s * g).flatten() for s, g in each]).sum() for each in pairs])
        return rates + (linear - linear.detach())

    def _state_gradients(
        self,
        answer: SampledAnswer,
        prompts: PromptBatch,
        said: AnswerBatch,
        advantages: Float[Tensor, " answers"],
        leaves: Sequence[EncodedImage],
    ) -> list[list[Tensor]]:
        """Of sum_i advantage_i log p(a_i | x) for each image x, at its states."""
        gradients = [[precise(torch.zeros_like(state)) for state in one.states] for one in leaves]
        informative = advantages.nonzero()[:, 0].tolist()
        for start in range(0, len(informative), answer.answers_per_forward):
            chosen = informative[start : start + answer.answers_per_forward]
            rows = [index // answer.num_answers for index in chosen]
            length = int(said.mask[chosen].sum(-1).max())
            answers = AnswerBatch(said.ids[chosen, :length], said.mask[chosen, :length])
            found = self.vlm.log_likelihoods(prompts.select(rows), answers, answer.temperature)
            images = sorted(set(rows))
            states = [state for i in images for state in leaves[i].states]
            new = iter(torch.autograd.grad((advantages[chosen] * found).sum(), states))
            for i in images:
                for total in gradients[i]:
                    total += next(new)
        return gradients


def _key(text: str, images: Sequence[Tensor]) -> int:
    """Names the random stream of a sample by its content: coarsely, so that rounding seldom names another one."""
    digest = hashlib.blake2b(text.encode(), digest_size=8)
    for image in images:
        means = adaptive_avg_pool2d(image.detach().float(), 4)
        digest.update((32 * means).round().byte().cpu().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


def _given_texts(answer: GivenAnswer, prompts: Sequence[str]) -> list[str]:
    """The answer of each prompt.  Raises UserError for one that brings none."""
    texts = [getattr(prompt, "answer", "") or answer.text for prompt in prompts]
    if None in texts:
        raise UserError(
            f"answer given: the prompt {prompts[texts.index(None)]!r} brings no answer; give one with each row "
            f"(data.answer), or answer.text in {FILE}"
        )
    return [text for text in texts if text is not None]
