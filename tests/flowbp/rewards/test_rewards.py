"""The rewards: preprocessing, published scales, gradients, and the originals' scores on the same weights."""

import argparse
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden.inputs import TOKENS, weights
from golden.inputs import pictures as waves
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import center_crop
from transformers import BatchEncoding, BertTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from vlms import load_vlm, vlm_folder

from flowbp.config import TrainConfig
from flowbp.evaluation.benchmarks.settings import parse_scorer
from flowbp.rewards import REWARDS, RewardConfig, RewardType, convert, load_reward, preprocess, resolve_reward
from flowbp.rewards.clip import AestheticReward, ClipReward
from flowbp.rewards.convert.checkpoints import load_qwen2_vl_config, load_tokenizer, read_checkpoint
from flowbp.rewards.convert.image_reward import save_image_reward
from flowbp.rewards.convert.open_clip import clip_from_open_clip, save_clip
from flowbp.rewards.image_reward import ImageReward
from flowbp.rewards.loading import CHECKPOINT_LAYERS, compute_in, load_head, modules_of, scoring_head
from flowbp.training.preflight import check_inputs
from imgen_common import hub
from imgen_common.config import load
from imgen_common.errors import UserError
from scripts.miniature.world.vocabulary import clip_tokenizer

REF = "builtin:shapes/heldout"
PROMPTS = ["a red circle", "two blue crosses"]


@pytest.fixture(scope="module")
def reward() -> ClipReward:
    return RewardConfig(ref=REF).load()


def pictures(height: int, width: int) -> torch.Tensor:
    smooth = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(smooth, (height, width), mode="bicubic", align_corners=True).clamp(0, 1)


def test_scores_are_the_models_own(reward: ClipReward) -> None:
    images = (pictures(32, 32) * 255).round() / 255
    folder = hub.resolve(REF)
    model, processor = CLIPModel.from_pretrained(folder).float(), CLIPProcessor.from_pretrained(folder)
    pil = [Image.fromarray((x * 255).byte().permute(1, 2, 0).numpy()) for x in images]
    batch = processor(text=PROMPTS, images=pil, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**batch).logits_per_image.diagonal()
        assert torch.allclose(reward(images, PROMPTS), expected, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (128, 64), (32, 40)])
def test_preprocessing_follows_the_processor(reward: ClipReward, height: int, width: int) -> None:
    images = pictures(height, width)
    processor = CLIPImageProcessor.from_pretrained(hub.resolve(REF))
    pil = [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]
    expected = torch.as_tensor(np.stack(processor(pil).pixel_values))
    ours = reward.preprocess(images)
    assert ours.shape == expected.shape
    # the processor rounds to 1/255 twice, and 1/255 is 0.015 after normalisation
    assert (ours - expected).abs().max() < 0.04


def test_the_gradient_is_the_slope(reward: ClipReward) -> None:
    double = ClipReward(reward.model.double(), CLIPImageProcessor.from_pretrained(hub.resolve(REF)), reward.tokenizer)
    images = (0.1 + 0.8 * pictures(48, 48).double()).requires_grad_()
    (gradient,) = torch.autograd.grad(double(images, PROMPTS).sum(), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1e-6 * direction
    with torch.no_grad():
        slope = (double(images + step, PROMPTS) - double(images - step, PROMPTS)).sum() / 2e-6
    reward.model.float()
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_other_models_are_refused() -> None:
    with pytest.raises(UserError, match="needs a 'clip' model, this is a 'qwen3'"):
        RewardConfig(ref=str(hub.resolve("builtin:shapes/generator") / "text_encoder")).load()
    with pytest.raises(UserError, match="needs a 'blip' model"):
        RewardConfig(score="imagereward", ref=REF).load()
    with pytest.raises(UserError, match=r"no head\.safetensors in it"):
        RewardConfig(score="aesthetic", ref=REF).load()


@pytest.mark.parametrize(
    ("score", "command"),
    [("hpsv2", "flowbp convert-reward hpsv2"), ("hpsv3", "flowbp convert-reward hpsv3"), ("vlm", "interleave export-")],
)
def test_how_to_make_a_missing_folder_is_said(score: str, command: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"rewards/{score}': no such local folder.*; if .* yet to be made: `{command}"):
        RewardConfig(score=score, ref=f"rewards/{score}").load()
    (file := tmp_path / "HPSv3.safetensors").touch()
    for ref in (tmp_path, file):
        with pytest.raises(UserError, match=rf"is not the folder of a reward; .* yet to be made: `{command}"):
            RewardConfig(score=score, ref=str(ref)).load()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as found:
        RewardConfig(score=score, ref=str(tmp_path)).load()
    assert command not in str(found.value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("how", ["missing", "other shape"])
def test_weights_that_do_not_fit_are_refused(how: str, device: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hub.resolve(REF), tmp_path / "reward"))
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("layer_norm1.weight"))
    del weights[name]
    save_file(
        weights | ({name: torch.zeros(2)} if how == "other shape" else {}),
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        UserError, match=r"1 weights are missing, the first is .*layer_norm1|no CLIPModel that can be loaded"
    ):
        RewardConfig(ref=str(folder)).load(device)


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_weights_of_a_variant_are_loaded(reward: ClipReward, variant: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hub.resolve(REF), tmp_path / "reward"))
    (folder / "model.safetensors").rename(folder / f"model.{variant}.safetensors")
    found, expected = (one.model.state_dict() for one in (RewardConfig(ref=str(folder)).load(), reward))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("names", [{}, {"0.weight": torch.zeros(2, 2)}, {"x": torch.zeros(1)}])
def test_a_head_that_does_not_fit_is_refused(names: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(names, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match="its weights do not fit Sequential"):
        load_head(tmp_path, scoring_head(4), "cpu")


class Brightness:
    """A reward as CONTRIBUTING.md describes one."""

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu") -> "Brightness":
        return cls()

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))


def test_a_new_reward_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "brightness", RewardType(__name__, "Brightness", "clip"))
    config = load(TrainConfig, [], ["rewards.0.score=brightness"])
    assert load_reward(config.rewards[0])(torch.full((2, 3, 4, 4), 0.25), PROMPTS).tolist() == [0.25, 0.25]
    assert parse_scorer(f"brightness={REF}", None).kind == "brightness"


def test_an_unknown_score_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown score 'hpsv4'; did you mean 'hpsv[23]'\?; allowed: clip, clipscore"):
        load(TrainConfig, [], ["rewards.0.score=hpsv4"])


# --- published checkpoints --------------------------------------------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rewards.json").read_text())
"""Scores of the original packages on tiny weights that are functions of their names; made by `golden/make.py`."""


class Ids:
    """A tokenizer that answers with the ids the goldens were made with."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.ids = torch.tensor(rows)

    def __call__(self, prompts: list[str], **_: object) -> BatchEncoding:
        return BatchEncoding({"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)})


def published(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(weights(key, tuple(shape))) for key, shape in GOLDEN[name]["shapes"].items()}


def small_tokenizer() -> CLIPTokenizer:
    """Of as many words as the goldens' models have embeddings: 19 letters, also at ends of words, and two marks."""
    letters = "abcdefghilmnoprstuw"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_a_tokenizer_with_more_words_than_its_model_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    {"hpsv2": golden_clip, "imagereward": golden_image_reward}[name](folder)
    clip_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match=r"reward: its tokenizer has 619 words, its \w+TextModel embeddings of 40"):
        RewardConfig(score=name, ref=str(folder)).load()


def golden_clip(folder: Path) -> ClipReward:
    save_clip(clip_from_open_clip(published("open_clip"), vision_heads=4, text_heads=4), small_tokenizer(), folder)
    reward = RewardConfig(score="hpsv2", ref=str(folder)).load()
    reward.tokenizer = Ids([[*row[:-1], 39] for row in TOKENS])
    return reward


def golden_image_reward(folder: Path) -> ImageReward:
    folder.mkdir()
    save_image_reward(published("image_reward"), small_tokenizer(), folder, heads=4)
    reward = RewardConfig(score="imagereward", ref=str(folder)).load()
    reward.tokenizer = Ids(TOKENS)
    return reward


def golden_aesthetic(folder: Path) -> AestheticReward:
    shutil.copytree(hub.resolve(REF), folder.parent / "clip")
    widths = (64, 1024, 128, 64, 16, 1)
    shapes = {f"layers.{i}.weight": (b, a) for i, a, b in zip(CHECKPOINT_LAYERS, widths, widths[1:], strict=False)}
    shapes |= {f"layers.{i}.bias": (b,) for i, b in zip(CHECKPOINT_LAYERS, widths[1:], strict=True)}
    torch.save({k: torch.from_numpy(weights(k, v)) for k, v in shapes.items()}, folder.parent / "head.pth")
    convert.convert_checkpoint("aesthetic", folder.parent / "head.pth", str(folder.parent / "clip"), folder)
    return RewardConfig(score="aesthetic", ref=str(folder)).load()


GOLDEN_NAMES = {"hpsv2": "open_clip", "imagereward": "image_reward"}
MAKERS = {
    "clip": lambda folder: RewardConfig(ref=REF).load(),
    "clipscore": lambda folder: RewardConfig(score="clipscore", ref=REF).load(),
    "hpsv2": golden_clip,
    "aesthetic": golden_aesthetic,
    "imagereward": golden_image_reward,
    "edit_clip": lambda folder: RewardConfig(score="edit_clip", ref=REF).load(),
    "vlm": lambda folder: load_vlm(vlm_folder("qwen3_vl", folder), exact=True),
}
"""A small one of every reward; the contract below holds for each."""


def test_every_reward_is_tested() -> None:
    assert set(MAKERS) | {"hpsv3"} == set(REWARDS)  # HPSv3 in test_hpsv3, in larger steps and on fewer images


@pytest.mark.parametrize("size", [(32, 32), (40, 56)])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_scores_are_those_of_the_original_package(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    reward = MAKERS[name](tmp_path / name)
    scores = reward(torch.from_numpy(waves(*size)), ["", ""])
    assert scores.tolist() == pytest.approx(GOLDEN[GOLDEN_NAMES[name]]["scores"][f"{size[0]}x{size[1]}"], abs=1e-4)
    assert abs(scores[0] - scores[1]) > 1e-3


@pytest.mark.parametrize("name", ["imagereward", "aesthetic"])
def test_a_head_is_planned_for_from_the_header_of_its_file(name: str, tmp_path: Path) -> None:
    parts = [list(modules_of([MAKERS[name](tmp_path / name)]))]
    parts.append(list(modules_of([RewardConfig(score=name, ref=str(tmp_path / name)).load("meta")])))
    sizes = [[(weight, p.shape) for part in one for weight, p in part.named_parameters()] for one in parts]
    assert sizes[0] == sizes[1]
    assert {p.device.type for part in parts[1] for p in part.parameters()} == {"meta"}


@pytest.mark.parametrize("size", [(33, 49), (35, 32), (122, 83)])
@pytest.mark.parametrize("name", ["imagereward", "aesthetic"])
def test_the_center_is_cut_out_where_the_original_packages_do(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    """By torchvision, which rounds half a line where transformers leaves it out."""
    reward, images = MAKERS[name](tmp_path / name), pictures(*size)
    vision = reward.vision if isinstance(reward, ImageReward) else reward.clip.model.vision_model
    seen: list[torch.Tensor] = []
    vision.register_forward_pre_hook(lambda module, given, named: seen.append(named["pixel_values"]), with_kwargs=True)
    reward(images, ["", ""])
    side = seen[0].shape[-1]
    resized = preprocess.resize_shorter(images, side)
    assert (max(resized.shape[-2:]) - side) % 4 == 3  # the first line is a half that is rounded up
    assert torch.equal(seen[0], preprocess.normalize_channels(center_crop(resized, [side, side])))


@pytest.mark.parametrize("name", MAKERS)
def test_images_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    reward, images = MAKERS[name](tmp_path / name), pictures(40, 56)
    with torch.no_grad():
        together, others = reward(images, PROMPTS), reward(torch.stack([images[0], 1 - images[1]]), PROMPTS)
    assert together.shape == (2,)
    assert together[0].item() == pytest.approx(others[0].item(), abs=1e-4)
    assert together[1] != others[1]
    with torch.no_grad():  # a text alone is the prompt of all
        assert torch.equal(reward(images, PROMPTS[0]), reward(images, [PROMPTS[0]] * 2))


@pytest.mark.parametrize("name", MAKERS)
def test_every_gradient_is_the_slope(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # in which transformers takes rotations
    reward = MAKERS[name](tmp_path / name)
    for part in vars(reward).values():
        for module in (part, getattr(part, "model", None)):
            if isinstance(module, torch.nn.Module):
                module.double()
    images = (0.1 + 0.8 * pictures(40, 56).double()).requires_grad_()  # what a filter overshoots has no slope
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        up, down = (reward(images + step * direction, PROMPTS).sum() for step in (1e-6, -1e-6))
    assert ((up - down) / 2e-6).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-3)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("vlm", "edit_clip")])
def test_a_network_in_bfloat16_scores_and_pulls_alike(name: str, tmp_path: Path) -> None:
    """Its scores are float32, and its numbers and heads keep their precision."""
    reward, found = MAKERS[name](tmp_path / name), []
    for dtype in ("float32", "bfloat16"):
        for module in modules_of([reward]):
            compute_in(module, dtype)
            assert {p.dtype for p in module.parameters() if p.dim() == 0} <= {torch.float32}
        leaf = pictures(40, 56).requires_grad_()
        scores = reward(leaf, PROMPTS)
        assert scores.dtype == torch.float32
        found.append((scores.detach(), torch.autograd.grad(scores.sum(), leaf)[0].flatten()))
    (exact, slope), (rounded, other) = found
    assert torch.equal(exact, rounded) == (not list(modules_of([reward])))
    torch.testing.assert_close(exact, rounded, rtol=0.05, atol=0.05)
    assert torch.cosine_similarity(slope, other, dim=0) > 0.95


def test_the_precision_of_a_reward_is_a_setting() -> None:
    folder = hub.resolve(REF)
    kinds = {
        name: {p.dtype for p in RewardConfig(ref=str(folder), dtype=name).load("meta").model.parameters() if p.dim()}
        for name in (None, "float32", "bfloat16")
    }
    assert kinds == {None: {torch.float32}, "float32": {torch.float32}, "bfloat16": {torch.bfloat16}}
    with pytest.raises(ValueError, match="dtype bfloat16: not with storage_dtype float16; set one of them to null"):
        RewardConfig(ref=REF, dtype="bfloat16", storage_dtype="float16")


@pytest.mark.parametrize("name", MAKERS)
def test_a_reward_knows_what_it_reads(name: str, tmp_path: Path) -> None:
    reward = MAKERS[name](tmp_path / "reward")
    limit = getattr(reward, "prompt_limit", None)
    if limit is None:  # it reads no prompts, or the whole of them
        assert name not in ("clip", "clipscore", "hpsv2", "imagereward")
        return
    original, given = reward.tokenizer, {}

    def tokenize(prompts: list[str], **options: Any) -> BatchEncoding:
        given.update(options)
        return original(prompts, **options)

    reward.tokenizer = tokenize
    reward(pictures(32, 32), ["a red circle"] * len(TOKENS))
    assert (given["truncation"], given["max_length"]) == (True, limit.max_length)
    texts = [" ".join(["a"] * (limit.max_tokens + extra)) for extra in (0, 1)]
    assert [limit.num_longer([text]) for text in ("", *texts, "K\u00e4se " * limit.max_tokens)] == [0, 0, 1, 1]
    cut = limit.tokenizer(texts, truncation=True, max_length=limit.max_length).input_ids
    assert cut[0] == cut[1]


def test_prompts_do_not_matter_to_aesthetics(tmp_path: Path) -> None:
    reward = golden_aesthetic(tmp_path / "aesthetic")
    assert torch.equal(reward(pictures(32, 32), PROMPTS), reward(pictures(32, 32), ["", ""]))


class Edit(str):
    """An instruction with what a row of edits may bring."""

    caption: str | None = None
    source_caption: str | None = None


def test_edit_clip_is_the_cosine_of_two_changes() -> None:
    """By transformers' own features, with sources of other sizes, captions or the instruction alone."""
    folder = hub.resolve(REF)
    model, processor = CLIPModel.from_pretrained(folder).float(), CLIPProcessor.from_pretrained(folder)
    images = torch.stack([*pictures(32, 32), 1 - pictures(32, 32)[0]])
    sources = [(pictures(64, 64)[1],), (1 - pictures(32, 32)[0], pictures(32, 32)[0]), ()]
    prompts = [Edit("make the circle red"), Edit("add a blue cross"), Edit("a red circle")]
    prompts[1].caption, prompts[1].source_caption = "a blue cross and a red circle", "a red circle"

    def features(images: list[torch.Tensor], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        pil = [Image.fromarray((255 * x).round().byte().permute(1, 2, 0).numpy()) for x in images]
        out = model(**processor(text=texts, images=pil, return_tensors="pt", padding=True))
        return out.image_embeds, out.text_embeds

    with torch.no_grad():
        after, wanted = features([*images], [prompts[0], str(prompts[1].caption), prompts[2]])
        before, said = features([sources[0][-1], sources[1][-1]], ["", "a red circle"])
        change = torch.cat([after[:2] - before, after[2:]])
        direction = torch.cat([wanted[:2] - said, wanted[2:]])
        expected = torch.cosine_similarity(change, direction)
        found = RewardConfig(score="edit_clip", ref=REF).load()(images, prompts, sources)
        unchanged = RewardConfig(score="edit_clip", ref=REF).load()(images[:1], prompts[:1], [(images[0],)])
    assert torch.allclose(found, expected, atol=0.02)  # the processor rounds a resized source to 1/255
    assert torch.allclose(found[1:], expected[1:], atol=2e-3)
    assert unchanged.item() == 0


def test_the_gradient_of_edit_clip_is_bounded_where_nothing_has_changed() -> None:
    image = pictures(32, 32)[:1].requires_grad_()
    score = RewardConfig(score="edit_clip", ref=REF).load()(image, PROMPTS[:1], [(image[0].detach(),)])
    (gradient,) = torch.autograd.grad(score.sum(), image)
    assert 0 < gradient.norm() < 1e4


@pytest.mark.parametrize("name", [name for name in MAKERS if name in ("edit_clip", "vlm")])
def test_rewards_that_see_sources_depend_on_them(name: str, tmp_path: Path) -> None:
    reward, images = MAKERS[name](tmp_path / name), pictures(32, 32)
    assert reward.sees_sources
    with torch.no_grad():
        scores = [reward(images, PROMPTS, [(s,)] * 2) for s in (pictures(16, 24)[0], 1 - pictures(16, 24)[0])]
    assert (scores[0] - scores[1]).abs().min() > 1e-4


def test_a_checkpoint_is_converted_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "HPS.pt", tmp_path / "tokenizer"
    clip_tokenizer().save_pretrained(tokenizer)
    state = published("open_clip")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items() if k != "ln_final.bias"}}, file)
    with pytest.raises(UserError, match=r"not a checkpoint of hpsv2: ln_final\.bias is missing"):
        convert.convert_checkpoint("hpsv2", file, str(tokenizer), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["HPS.pt", "tokenizer"]
    with pytest.raises(UserError, match="exists already"):
        convert.convert_checkpoint("hpsv2", file, str(tokenizer), tokenizer)
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no tokenizer there"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(
        UserError, match=r"model 'org/none@main': no such local folder; .*`flowbp prefetch org/none@main`"
    ):
        load_tokenizer("org/none@main")


@pytest.mark.parametrize(("kind", "name"), [("hpsv2", "open_clip"), ("imagereward", "image_reward")])
def test_the_tokenizer_of_another_model_is_refused(kind: Any, name: str, tmp_path: Path) -> None:
    """As bert-base-uncased, which the recipes name for imagereward, for hpsv2: its scores would be of other words."""
    torch.save(published(name), tmp_path / "a.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abc"]))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    with pytest.raises(
        UserError, match=rf"bert: its tokenizer, a Bert.* of 8 tokens, is not that of {kind}, .* 40; give"
    ):
        convert.convert_checkpoint(kind, tmp_path / "a.pt", str(tmp_path / "bert"), tmp_path / "out")
    small_tokenizer().save_pretrained(tmp_path / "own")
    convert.convert_checkpoint(kind, tmp_path / "a.pt", str(tmp_path / "own"), tmp_path / "out")


@pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(2)], None, {0: torch.ones(2)}])
def test_a_checkpoint_without_names_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: holds no tensors by name but a \w+; give HPS\.pt"):
        read_checkpoint(tmp_path / "a.pt", "HPS.pt")


@pytest.mark.parametrize(("file", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[]")])
def test_a_damaged_tokenizer_is_refused(file: str, content: str, tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match="no tokenizer there"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl", "vision_config": 3}')
    with pytest.raises(UserError, match="no configuration there"):
        load_qwen2_vl_config(str(tmp_path))


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("run",)


def test_what_else_a_checkpoint_holds_is_said_without_torch_s_advice(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"plain containers \(it holds argparse\.Namespace\), and anything") as said:
        read_checkpoint(tmp_path / "a.pt", "HPS.pt")
    assert "weights_only" not in str(said.value)
    (tmp_path / "b.pt").write_text("<html>\nnot here")
    with pytest.raises(UserError) as said:
        read_checkpoint(tmp_path / "b.pt", "HPS.pt")
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("companion", "said"),
    [
        ("builtin:shapes/critic", "is a 'qwen3_vl' model; aesthetic needs the CLIP of its head"),
        ("builtin:shapes/generator", "is no model of transformers; aesthetic needs"),
        ("builtin:shapes/reward", r"its features are \d+ wide, the head reads 768"),
    ],
)
def test_a_head_of_another_clip_is_refused(companion: str, said: str, tmp_path: Path) -> None:
    widths = (768, 1024, 128, 64, 16, 1)
    layers = zip(CHECKPOINT_LAYERS, pairwise(widths), strict=True)
    head = {f"layers.{i}.weight": torch.zeros(b, a) for i, (a, b) in layers}
    head |= {name.replace("weight", "bias"): torch.zeros(len(weight)) for name, weight in head.items()}
    torch.save(head, tmp_path / "head.pth")
    with pytest.raises(UserError, match=said):
        convert.convert_checkpoint("aesthetic", tmp_path / "head.pth", companion, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="anything else is not unpickled"):
        read_checkpoint(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""


def test_weights_of_a_model_of_another_kind_are_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tens of gigabytes; the files that say so are fetched first."""
    wanted: list[bool] = []
    monkeypatch.setattr(hub, "resolve", lambda ref, *, weights=True, **_: wanted.append(weights) or tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(UserError, match="needs a 'clip' model, this is a 'siglip'"):
        resolve_reward(RewardConfig(score="clip", ref="org/name"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(UserError, match="org/name: cannot train a StableDiffusionXLPipeline"):
        check_inputs(load(TrainConfig, [], ["model.ref=org/name"]), 1)
    assert wanted == [False, False]
