"""Vision-language models as rewards: the processor's values, gradients, batches, and the ways to read a score."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vlms import FAMILIES, TEMPLATE, TOKEN, load_vlm, processor_of, vlm_folder, write_settings

from flowbp.config import TrainConfig
from flowbp.data.edits import Edit, Source
from flowbp.evaluation.benchmarks.run import prepare_benchmark
from flowbp.evaluation.benchmarks.settings import BenchmarkRequest, JudgeConfig, ScorerSpec
from flowbp.evaluation.sources import model_source
from flowbp.rewards import RewardConfig
from flowbp.rewards.preprocess import extract_patches
from flowbp.rewards.vlm import model as vlm_model
from flowbp.rewards.vlm import reward as vlm_reward
from flowbp.rewards.vlm.model import AnswerBatch, VisionLanguageModel
from flowbp.rewards.vlm.reward import VlmReward
from flowbp.rewards.vlm.settings import NumberRule, ObjectRule, TextRule, VlmSettings
from flowbp.training import preflight
from imgen_common.config import load
from imgen_common.errors import UserError

PROMPTS = ["make it red", "add two blue crosses below the green one"]
SCALE = {"kind": "token", "scale": {"1": 1, "2": 2, "5": 5}, "prefix": "Score: "}
VQA = {"kind": "token", "token": "y"}
GIVEN = {"kind": "given", "text": "yes, it is"}
EVEN = {"kind": "text", "begins": "a"}
SAMPLED = {"kind": "sampled", "num_answers": 6, "max_new_tokens": 5, "accept": EVEN}
ANSWERS = {"token": TOKEN, "scale": SCALE, "vqa": VQA, "given": GIVEN, "sampled": SAMPLED}


class Prompt(str):
    """A prompt with the attributes that a row may give it."""

    answer: str | None = None


def pictures(height: int, width: int, seed: int = 0, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), generator=generator) / 255


SOURCES = [(pictures(16, 24, 1)[0],), (pictures(32, 16, 2)[0], pictures(24, 24, 3)[0])]


def pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: vlm_folder(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes rotations in float32, whatever the model is in."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def with_settings(folder: Path, answer: dict[str, Any], **settings: Any) -> Path:
    return write_settings(folder, {"template": TEMPLATE, "answer": answer} | settings)


def model_inputs(folder: Path, content: list[list[Any]], prefix: str = "") -> Any:
    """What transformers' processor makes of conversations of texts and images, padded on the left."""
    processor = processor_of(folder)
    parts = [
        [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": pil(p)} for p in each]
        for each in content
    ]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": each}], add_generation_prompt=True) + prefix
        for each in parts
    ]
    images = [pil(p) for each in content for p in each if not isinstance(p, str)]
    return processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")


def without_images(logits: torch.Tensor) -> torch.Tensor:
    """Without the tokens of images and videos, which no answer may have."""
    return logits.index_fill(-1, torch.tensor([261, 262]), -torch.inf)


def contents(images: torch.Tensor) -> list[list[Any]]:
    return [
        [*sources, f"was: {prompt} {{braces}} ", image, " now?"]
        for sources, prompt, image in zip(SOURCES, PROMPTS, images, strict=True)
    ]


# --- the model's own values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(8, 8), (32, 24), (64, 64)])
def test_pixels_are_the_processors_on_whole_tokens(
    family: str, size: tuple[int, int], folders: dict[str, Path]
) -> None:
    images, processor = pictures(*size), processor_of(folders[family]).image_processor
    expected = processor([pil(image) for image in images], return_tensors="pt")
    patches, grid = extract_patches(images, processor)
    assert torch.equal(grid, expected.image_grid_thw)
    assert (patches - expected.pixel_values).abs().max() < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_models_own(family: str, folders: dict[str, Path]) -> None:
    """Through transformers' processor, in one batch, with sources of other sizes and prompts of other lengths."""
    folder, images = folders[family], pictures(24, 16)
    plain = FAMILIES[family][1].from_pretrained(folder).eval()
    tokenizer = processor_of(folder).tokenizer
    y, n, *digits = (tokenizer(c).input_ids[0] for c in "yn125")
    with torch.no_grad():
        direct = plain(**model_inputs(folder, contents(images))).logits[:, -1]
        prefixed = plain(**model_inputs(folder, contents(images), "Score: ")).logits[:, -1]
        answered = model_inputs(folder, contents(images), GIVEN["text"] + "<|im_end|>")
        length = len(GIVEN["text"]) + 1
        given = without_images(plain(**answered).logits[:, -length - 1 : -1]).log_softmax(-1)
        found = {
            name: load_vlm(with_settings(folder, ANSWERS[name]))(images, PROMPTS, SOURCES)
            for name in ("token", "scale", "vqa", "given")
        }
    probability = direct.softmax(-1)[:, y]
    expected = {
        "token": direct[:, y] - direct[:, n],
        "scale": prefixed[:, digits].softmax(-1) @ torch.tensor([1.0, 2.0, 5.0]),
        "vqa": (probability / (1 - probability)).log(),
        "given": given.gather(-1, answered.input_ids[:, -length:, None])[..., 0].mean(-1),
    }
    for name, scores in found.items():
        assert torch.allclose(scores, expected[name], atol=1e-4), name
        assert (scores[0] - scores[1]).abs() > 1e-3


@pytest.mark.slow
def test_the_prompt_is_shown_where_the_template_says(folders: dict[str, Path]) -> None:
    """The image may come first; without sources their place is empty, or a white image; of more the last ones count."""
    folder, images = folders["qwen3_vl"], pictures(16, 16)
    white = torch.ones(3, 16, 16)
    cases: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
        ({"template": "<image>x<source>{prompt}"}, [SOURCES[1]] * 2, [images[0], "x", *SOURCES[1], "p"]),
        ({"template": "<image>x<source>{prompt}"}, [], [images[0], "xp"]),
        ({"template": "<source>{prompt}<image>", "blank_source": True}, [(), ()], [white, "p", images[0]]),
        ({"template": "<source>{prompt}<image>", "max_sources": 1}, [SOURCES[1]] * 2, [SOURCES[1][1], "p", images[0]]),
        ({"template": "{prompt}<image>"}, [SOURCES[1]] * 2, ["p", images[0]]),
    ]
    plain = FAMILIES["qwen3_vl"][1].from_pretrained(folder).eval()
    for settings, sources, content in cases:
        reward = load_vlm(with_settings(folder, TOKEN, **settings))
        with torch.no_grad():
            logits = plain(**model_inputs(folder, [content])).logits[0, -1]
            found = reward(images, ["p", "p"], sources)[0]
        assert found.item() == pytest.approx((logits[ord("y") - 33] - logits[ord("n") - 33]).item(), abs=1e-4), settings


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|endoftext|>"])
def test_a_special_token_in_a_prompt_is_none(token: str, folders: dict[str, Path]) -> None:
    """It neither ends the turn nor asks for another image."""
    reward = load_vlm(with_settings(folders["qwen3_vl"], TOKEN))
    text = reward._render(f"a {token} b <image> {{prompt}}", 1)
    counts = [reward._render("a b", 1).count(special) for special in (token, "<|image_pad|>")]
    assert [text.count(special) for special in (token, "<|image_pad|>")] == counts


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answer", ["token", "given"])
def test_the_gradient_is_the_slope(family: str, answer: str, folders: dict[str, Path]) -> None:
    reward = load_vlm(with_settings(folders[family], ANSWERS[answer]), exact=True)
    images = (0.1 + 0.8 * pictures(20, 28)).double().requires_grad_()  # resized, and what a filter overshoots is cut
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS, SOURCES).sum(), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        up, down = (reward(images + step * direction, PROMPTS, SOURCES).sum() for step in (1e-5, -1e-5))
    assert ((up - down) / 2e-5).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-6)
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_answers_have_the_gradient_of_reinforce(family: str, folders: dict[str, Path]) -> None:
    """By hand: the answers that were drawn, their probabilities through the processor's path with plain autograd."""
    reward = load_vlm(with_settings(folders[family], SAMPLED | {"temperature": 0.7}), exact=True)
    drawn = []
    sample = reward.vlm.sample
    reward.vlm.sample = lambda *given: drawn.append(sample(*given)) or drawn[-1]  # type: ignore[method-assign]
    verdicts = iter([True, False, False, True, True, False, True, True, False, True, True, True])
    accept_where(reward, lambda said: next(verdicts))
    images = pictures(24, 16).double().requires_grad_()
    scores = reward(images, PROMPTS, SOURCES)
    (gradient,) = torch.autograd.grad(scores @ torch.tensor([1.0, 2.0], dtype=scores.dtype), images)
    assert scores.tolist() == pytest.approx([1 / 2, 5 / 6])

    signs = [[1, -1, -1, 1, 1, -1], [1, 1, -5, 1, 1, 1]]
    expected = torch.zeros_like(images)
    for i in range(2):
        text = reward._render(PROMPTS[i], len(SOURCES[i]))
        for j in range(6):
            row, said = 6 * i + j, drawn[0]
            ids = said.ids[row][said.mask[row]][None]
            encoded = reward.vlm.encode_images([*(s[None].double() for s in SOURCES[i]), images[i : i + 1]])
            prompt = reward.vlm.tokenize([text], [encoded])
            whole = {
                "input_ids": torch.cat([prompt.ids, ids], 1),
                "image_grid_thw": torch.stack([image.grid for image in encoded]),
                "pixel_values": torch.cat(
                    [
                        extract_patches(x, reward.vlm.processor.image_processor)[0]
                        for x in (*(s[None].double() for s in SOURCES[i]), images[i : i + 1])
                    ]
                ),
            }
            whole["mm_token_type_ids"] = (whole["input_ids"] == 261).int()
            logits = without_images(reward.vlm.model(**whole).logits[:, -ids.shape[1] - 1 : -1]) / 0.7
            found = logits.log_softmax(-1).gather(-1, ids[..., None]).sum()
            advantage = signs[i][j] * (0.5 if i == 0 else 1 / 6) / 5
            expected += (1 + i) * advantage * torch.autograd.grad(found, images)[0]
    assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-9)
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()


def accept_where(reward: VlmReward, accepts: Callable[[str], bool], **changed: int) -> None:
    """Another rule of acceptance, under which the answers of random weights are mixed."""
    rule = SimpleNamespace(accepts=accepts)
    answer = reward.settings.answer.model_copy(update={"accept": rule, **changed})
    reward.settings = reward.settings.model_copy(update={"answer": answer})


def is_even(said: str) -> bool:
    return sum(map(ord, said)) % 2 == 0


class Strata:
    """Numbers that fill [0, 1) evenly, one for each answer: sums over answers become integrals."""

    def __init__(self, index: int, count: int) -> None:
        self.value = (index + 0.5) / count

    def random(self, size: int) -> np.ndarray:
        return np.full(size, self.value)


@pytest.mark.usefixtures("in_float64")
def test_the_gradient_is_that_of_the_probability_of_acceptance(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of answers of one token, so that it can be summed over the vocabulary."""
    count = 500  # more than a configuration may ask for
    folder = with_settings(folders["qwen3_vl"], SAMPLED | {"max_new_tokens": 1, "temperature": 0.5})
    reward = load_vlm(folder, exact=True)
    monkeypatch.setattr(vlm_reward, "numpy_generator", lambda key, purpose, index: Strata(index, count))
    accept_where(reward, is_even, num_answers=count, answers_per_forward=count)
    images = pictures(16, 16, count=1).double().requires_grad_()
    scores = reward(images, PROMPTS[:1], SOURCES[:1])
    (gradient,) = torch.autograd.grad(scores.sum(), images)

    plain = [encoded for source in SOURCES[0] for encoded in reward.vlm.encode_images([source[None].double()])]
    prompt = reward.vlm.tokenize([reward._render(PROMPTS[0], 1)], [[*plain, *reward.vlm.encode_images([images])]])
    probability = (without_images(reward.vlm.next_logits(prompt)) / 0.5).softmax(-1)[0]
    words = reward.vlm.decode(AnswerBatch(torch.arange(264)[:, None], torch.ones(264, 1, dtype=torch.bool)))
    accepting = torch.tensor([is_even(word) for word in words])
    exact = probability[accepting].sum()
    assert 0.1 < exact < 0.9
    assert scores.item() == pytest.approx(exact.item(), abs=0.03)
    (expected,) = torch.autograd.grad(exact, images)
    assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), 0) > 0.97
    assert gradient.norm().item() == pytest.approx(expected.norm().item(), rel=0.05)


def test_parts_change_no_gradient(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    images, gradients = pictures(24, 16).requires_grad_(), []
    for per_forward, at_once in ((100, 512), (4, 512), (1, 512), (4, 2)):
        monkeypatch.setattr(vlm_model, "TOKENS_AT_ONCE", at_once)
        reward = load_vlm(with_settings(folders["qwen3_vl"], SAMPLED | {"answers_per_forward": per_forward}))
        accept_where(reward, is_even)
        gradients.append(torch.autograd.grad(reward(images, PROMPTS, SOURCES).sum(), images)[0])
    assert all(torch.allclose(gradients[0], other, rtol=1e-3, atol=1e-7) for other in gradients[1:])
    assert gradients[0].abs().max() > 0


def test_in_bfloat16_a_score_and_its_gradient_are_float32(folders: dict[str, Path]) -> None:
    """As on a GPU: the model rounds, the image does not."""
    images = pictures(24, 16).requires_grad_()
    for name in ("token", "given"):
        results = []
        for dtype in (torch.float32, torch.bfloat16):
            reward = load_vlm(with_settings(folders["qwen3_vl"], ANSWERS[name]))
            reward.vlm.model.to(dtype)
            scores = reward(images, PROMPTS, SOURCES)
            results.append((scores.detach(), torch.autograd.grad(scores.sum(), images)[0].flatten()))
        (exact, slope), (scores, gradient) = results
        assert scores.dtype == gradient.dtype == torch.float32
        assert torch.allclose(scores, exact, atol=0.2)
        assert torch.cosine_similarity(slope, gradient, 0) > 0.9
    reward = load_vlm(with_settings(folders["qwen3_vl"], SAMPLED))
    reward.vlm.model.bfloat16()
    accept_where(reward, is_even)
    assert torch.autograd.grad(reward(images, PROMPTS, SOURCES).sum(), images)[0].isfinite().all()


# --- batches and repetition -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ANSWERS)
def test_neither_neighbours_nor_padding_change_a_score(family: str, name: str, folders: dict[str, Path]) -> None:
    reward = load_vlm(with_settings(folders[family], ANSWERS[name]), exact=True)
    if name == "sampled":
        accept_where(reward, is_even)
    images = pictures(24, 16).double().requires_grad_()
    together = reward(images, PROMPTS, SOURCES)
    (gradient,) = torch.autograd.grad(together.sum(), images)
    for i in range(2):
        one = images[i : i + 1]
        alone = reward(one, PROMPTS[i : i + 1], SOURCES[i : i + 1])
        assert together[i].item() == pytest.approx(alone.item(), abs=1e-9)
        assert torch.allclose(torch.autograd.grad(alone.sum(), images)[0][i], gradient[i], atol=1e-9)
    if name != "sampled":
        swapped = reward(images, PROMPTS[::-1], SOURCES[::-1])
        assert (together - swapped).abs().min() > 1e-4


@pytest.mark.parametrize(("size", "allowed"), [((1, 300), False), ((402, 2), False), ((200, 1), True)])
def test_sources_that_the_model_does_not_take_are_refused(
    folders: dict[str, Path], size: tuple[int, int], allowed: bool
) -> None:
    edit = Edit("make it red", [Source("digest", size, lambda: pil(pictures(*size)[0]))])
    template = {"template": "<source><image>{prompt}"}
    reward = load_vlm(with_settings(next(iter(folders.values())), TOKEN, **template))
    with nullcontext() if allowed else pytest.raises(UserError, match=rf"is {size[1]}x{size[0]}; models take at most"):
        reward.check_prompts(["a red circle", edit])


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_answers_are_drawn_from_the_models_probabilities(folders: dict[str, Path]) -> None:
    """Each token where its number lies in the distribution function, which one pass over the whole answer gives."""
    for family in FAMILIES:
        reward = load_vlm(with_settings(folders[family], SAMPLED), exact=True)
        vlm, images = reward.vlm, pictures(24, 16).double()
        encoded = [vlm.encode_images([s[None].double() for s in SOURCES[i]] + [images[i : i + 1]]) for i in range(2)]
        prompts = vlm.tokenize([reward._render(PROMPTS[i], len(SOURCES[i])) for i in range(2)], encoded)
        numbers = torch.rand(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        said = vlm.sample(prompts, numbers, 1.5)
        assert said.mask.any(0).all()
        for row in range(6):
            ids = said.ids[row][said.mask[row]][None]
            one = vlm.tokenize([reward._render(PROMPTS[row // 3], len(SOURCES[row // 3]))], [encoded[row // 3]])
            for step in range(ids.shape[1]):
                before = torch.cat([one.ids, ids[:, :step]], 1)
                logits = vlm.model(
                    input_ids=before,
                    attention_mask=torch.ones_like(before),
                    position_ids=torch.cat(
                        [one.positions, (one.next_positions[:, None] + torch.arange(step)).expand(3, -1, -1)], 2
                    ),
                    mm_encoder_outputs={"image": outputs_of(encoded[row // 3])},
                ).logits[0, -1]
                below = (without_images(logits) / 1.5).softmax(-1).cumsum(-1)
                token = ids[0, step]
                assert (below[token - 1] if token else 0) <= numbers[row, step] <= below[token] + 1e-9


def outputs_of(images: list[Any]) -> Any:
    first, *layers = zip(*(image.states for image in images), strict=True)
    return SimpleNamespace(pooler_output=first, deepstack_features=layers)


@pytest.mark.slow
def test_equal_images_are_judged_alike_and_others_anew(folders: dict[str, Path]) -> None:
    """Also by another object, as after a resume, and without a gradient."""
    folder = with_settings(folders["qwen3_vl"], SAMPLED | {"num_answers": 64, "max_new_tokens": 3})
    first, second = load_vlm(folder), load_vlm(folder)
    images = pictures(16, 16, count=1)
    drawn: list[Any] = []
    for reward in (first, second):
        accept_where(reward, is_even)
        sample = reward.vlm.sample
        reward.vlm.sample = lambda *given, sample=sample: drawn.append(sample(*given)) or drawn[-1]  # type: ignore
    scores = [first(images, PROMPTS[:1]), second(images.clone().requires_grad_(), PROMPTS[:1])]
    assert torch.equal(scores[0], scores[1].detach())
    first(1 - images, PROMPTS[:1])
    first(images, PROMPTS[1:])
    assert torch.equal(drawn[0].ids, drawn[1].ids)
    first(images + 1e-7 * torch.randn_like(images), PROMPTS[:1])  # the rounding of another micro-batch
    assert torch.equal(drawn[0].ids, drawn[-1].ids)
    assert drawn[0].ids.shape != drawn[2].ids.shape or not torch.equal(drawn[0].ids, drawn[2].ids)
    assert drawn[0].ids.shape != drawn[3].ids.shape or not torch.equal(drawn[0].ids, drawn[3].ids)


@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_what_the_chat_template_opens_belongs_to_the_answer(opened: str, folders: dict[str, Path]) -> None:
    reward, said = load_vlm(with_settings(folders["qwen3_vl"], SAMPLED)), []
    reward.vlm.processor.chat_template += opened
    accept_where(reward, lambda answer: bool(said.append(answer)))
    with torch.no_grad():
        assert reward(pictures(16, 16), PROMPTS).tolist() == [0, 0]
    assert len(said) == 12
    assert all(answer.startswith("<think>") == bool(opened) for answer in said)


def test_answers_end_with_the_models_positions(folders: dict[str, Path]) -> None:
    reward = load_vlm(with_settings(folders["qwen3_vl"], SAMPLED | {"num_answers": 2, "max_new_tokens": 1000}))
    reward.vlm.ends = []
    length = len(reward.vlm.tokenizer(reward._render("p" * 400, 0)).input_ids) + 3  # 4 tokens of 1 image
    with torch.no_grad():
        encoded = reward.vlm.encode_images([pictures(16, 16, count=1)])
        prompts = reward.vlm.tokenize([reward._render("p" * 400, 0)], [encoded])
        assert prompts.ids.shape[1] == length
        said = reward.vlm.sample(prompts, torch.rand(2, 1000, dtype=torch.float64), 1.0)
    assert said.mask.sum(1).tolist() == [512 - length] * 2
    with pytest.raises(UserError, match=r"a prompt has \d+ tokens with its images, and the model reads 512"):
        reward(pictures(16, 16, count=1), ["p" * 600])


def test_a_prompt_may_bring_its_answer(folders: dict[str, Path]) -> None:
    images, own = pictures(16, 16), Prompt(PROMPTS[0])
    own.answer = "no"
    fixed = load_vlm(with_settings(folders["qwen3_vl"], {"kind": "given", "text": "no"}))
    free = load_vlm(with_settings(folders["qwen3_vl"], {"kind": "given", "text": "yes"}))
    with torch.no_grad():
        expected, found = fixed(images, PROMPTS), free(images, [own, PROMPTS[1]])
    assert found[0] == expected[0]
    assert found[1] != expected[1]
    none = load_vlm(with_settings(folders["qwen3_vl"], {"kind": "given"}))
    with pytest.raises(
        UserError, match=r"the prompt 'add two .*' brings no answer; give one with each row .*, or answer\.text"
    ):
        none(images, [own, PROMPTS[1]])


def test_missing_answers_are_found_before_a_run(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": "a cat", "said": "yes"}, {"prompt": "a dog"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = with_settings(folders["qwen3_vl"], {"kind": "given"})
    sets = [f"data.prompts={tmp_path / 'rows.jsonl'}", "data.answer=said", f"rewards=[{{ref: '{folder}', score: vlm}}]"]
    sets += [f"eval.{key}={tmp_path / 'rows.jsonl'}" for key in ("prompts", "quick_prompts")]
    with pytest.raises(UserError, match="the prompt 'a dog' brings no answer"):
        preflight.check_run(load(TrainConfig, [], sets), 1)
    with pytest.raises(UserError, match=r"data\.answer: no row has anything under 'sad'; name the column"):
        preflight.check_run(load(TrainConfig, [], [*sets, "data.answer=sad"]), 1)


def test_missing_answers_are_found_before_a_benchmark_draws(folders: dict[str, Path], tmp_path: Path) -> None:
    file, folder = tmp_path / "rows.jsonl", with_settings(folders["qwen3_vl"], {"kind": "given"})
    source = model_source("builtin:shapes/generator", tmp_path, ["data.answer=said"])
    request = BenchmarkRequest("hpdv2", str(file), (ScorerSpec(name="vlm", kind="vlm", ref=str(folder)),))

    def content(*rows: dict[str, str]) -> str:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare_benchmark(source, request, tmp_path / "out", 1, JudgeConfig()).config.content

    with pytest.raises(UserError, match="the prompt 'a dog' brings no answer"):
        content({"prompt": "a cat", "said": "yes"}, {"prompt": "a dog"})
    # a folder goes on with equal answers only, of which its scores are
    yes, no = ({"prompt": "a cat", "said": said} for said in ("yes", "no"))
    assert content(yes) == content(yes) != content(no)


def test_on_the_meta_device_no_weights_are_needed(folders: dict[str, Path]) -> None:
    folder = with_settings(folders["qwen3_vl"], SAMPLED)
    reward = RewardConfig(score="vlm", ref=str(folder)).load("meta")
    assert isinstance(reward, VlmReward)
    assert reward.vlm.model.device.type == "meta"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"template": "{prompt}"}, r"reward\.json: template: has 0 places <image>; it must stand in it once"),
        ({"template": "<image><image>"}, r"template: has 2 places <image>"),
        ({"template": "<image><source><source>"}, r"template: has 2 places <source>; it must stand in it at most once"),
        ({"template": "<image><|im_end|>"}, r"reward\.json: template: remove <\|im_end\|>"),
        ({"answer": {"kind": "token", "token": "yes"}}, r"answer 'yes' is 3 tokens of this model; choose one that is"),
        ({"answer": {"kind": "token", "scale": {"1": 1, "10": 10}}}, r"answer '10' is 2 tokens"),
        ({"answer": {"kind": "token"}}, r"give either token, perhaps with against, or scale"),
        ({"answer": {"kind": "token", "token": "y", "against": ["y"]}}, r"needs different tokens"),
        ({"answer": {"kind": "tokens"}}, r"reward\.json: answer\.kind: .*tokens"),
        ({"answer": {"kind": "sampled"}}, r"reward\.json: answer\.accept"),
        ({"answer": SAMPLED | {"num_answers": 1}}, r"answer\.num_answers: .*2"),
        ({"answer": SAMPLED | {"accept": {"kind": "object", "key": "ok"}}}, r"give either equals, .* or at_least"),
        ({"answer": SAMPLED | {"accept": {"kind": "regex", "pattern": "(a+)+"}}}, r"answer\.accept\.kind"),
        ({"answer": TOKEN, "temperatur": 1}, r"reward\.json: .*temperatur"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str, folders: dict[str, Path]) -> None:
    folder = write_settings(folders["qwen3_vl"], {"template": TEMPLATE, "answer": TOKEN} | settings)
    with pytest.raises(UserError, match=said) as error:
        RewardConfig(score="vlm", ref=str(folder)).load("meta")
    assert "\n" not in str(error.value)


def test_a_processor_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["qwen3_vl"], tmp_path / "model")
    for file in folder.glob("*processor_config.json"):
        described = json.loads(file.read_text())
        for part in (described, described.get("image_processor", {})):
            part |= {"patch_size": 14} if "patch_size" in part else {}
        file.write_text(json.dumps(described))
    with pytest.raises(
        UserError, match=r"has patch_size 14, its vision tower patch_size \d+; copy preprocessor_config"
    ):
        VisionLanguageModel.load(folder, "meta")


def test_other_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no reward\.json in it, which says what the model is asked; write one"):
        RewardConfig(score="vlm", ref="builtin:shapes/critic").load("meta")
    with pytest.raises(UserError, match=r"needs a 'qwen2_vl' or 'qwen2_5_vl' or 'qwen3_vl' model, this is a 'clip'"):
        RewardConfig(score="vlm", ref="builtin:shapes/heldout").load("meta")
    folder = with_settings(folders["qwen3_vl"], TOKEN)
    template = folder / "chat_template.jinja"
    words = template.read_text()
    template.unlink()
    with pytest.raises(UserError, match=r"has no processor with a chat template; copy all files of the model"):
        RewardConfig(score="vlm", ref=str(folder)).load("meta")
    template.write_text(words)
    (folder / "reward.json").write_text("{")
    with pytest.raises(UserError, match=r"reward\.json"):
        RewardConfig(score="vlm", ref=str(folder)).load("meta")


# --- which answers accept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "accepts"),
    [
        ('<think>a</think><answer>{"ok": true, "why": "x"}</answer>', True),
        ('<think>a</think><answer>{"ok": false, "why": "x"}</answer>', False),
        ('<think>a</think><answer>{"ok": true}</answer>', False),  # a text is missing
        ('<think>a</think><answer>{"ok": 1, "why": "x"}</answer>', False),
        ('<answer>{"ok": true, "why": "x"}</answer>', False),  # strict
        ("<think>a</think><answer>[true]</answer>", False),
        ("", False),
        ("<answer>" * 10_000, False),
    ],
)
def test_objects_accept(answer: str, accepts: bool) -> None:
    assert ObjectRule(key="ok", equals=True, texts=("why",)).accepts(answer) == accepts


@pytest.mark.parametrize(("value", "accepts"), [("3", True), ("2.9", False), ("true", False), ('"9"', False)])
def test_numbers_in_objects_accept(value: str, accepts: bool) -> None:
    assert (
        ObjectRule(key="s", at_least=3).accepts(f"<think></think><answer>{{{json.dumps('s')}: {value}}}</answer>")
        == accepts
    )


@pytest.mark.parametrize(
    ("answer", "accepts"),
    [
        ("Final Score: 4", True),
        ("<think>Final Score: 5</think>I say Final Score: 3.5", False),
        ("Final Score: 1, no: Final Score: 4.0/5", True),
        ("4", False),
        ("Final Score: none", False),
        ("Final Score: " + "9" * 100_000, True),
    ],
)
def test_numbers_accept(answer: str, accepts: bool) -> None:
    assert NumberRule(after="Final Score:", at_least=4).accepts(answer) == accepts


@pytest.mark.parametrize(
    ("answer", "accepts"),
    [("Yes.", True), ("<think>no</think>\n yes", True), ("no, yes", False), ("<think>yes", False)],
)
def test_first_words_accept(answer: str, accepts: bool) -> None:
    assert TextRule(begins="YES").accepts(answer) == accepts


def test_settings_are_those_of_the_documentation() -> None:
    """Every `json` block of the page is a reward.json."""
    page = (Path(__file__).parents[3] / "docs" / "flowbp.md").read_text()
    part = page.partition("## Vision-language models as rewards")[2].partition("\n## ")[0]
    blocks = [block.partition("```")[0] for block in part.split("```json\n")[1:]]
    assert len(blocks) >= 3
    assert {VlmSettings.model_validate_json(block).answer.kind for block in blocks} == {"token", "sampled", "given"}
