"""HPSv3: the original's scores on the same weights, the processor's images, gradients, and the conversion."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from golden.inputs import HPSV3_WORDS, QWEN2_VL, QWEN2_VL_CHAT, QWEN2_VL_TOKENS, byte_tokenizer, pictures, weights
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2Tokenizer, Qwen2VLModel, Qwen2VLProcessor, Qwen2VLVideoProcessor

from flowbp.rewards import RewardConfig, convert
from flowbp.rewards.convert.hpsv3 import read_prompt_template
from flowbp.rewards.hpsv3 import IMAGE_AREA, HPSv3
from flowbp.rewards.preprocess import extract_patches
from imgen_common import hub
from imgen_common.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "hpsv3.json").read_text())
"""Scores of the original package on tiny weights that are functions of their names; made by `golden/make_hpsv3.py`."""
PROMPTS = ["a red circle", "two blue crosses and one green square on the left"]


def published() -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(weights(key, tuple(shape))) for key, shape in GOLDEN["shapes"].items()}


def companion(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN2_VL))
    Qwen2Tokenizer(tokenizer_object=byte_tokenizer(), pad_token="<|endoftext|>").save_pretrained(folder)
    return folder


def source(file: Path, **changed: str) -> Path:
    """A Python file that sets the constants of the published one, and would stop whoever runs it."""
    file.write_text("".join(f"{name} = {text!r}\n" for name, text in (HPSV3_WORDS | changed).items()) + "\n1 / 0\n")
    return file


def converted(base: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file(state, base / "HPSv3.safetensors")
    qwen, words = str(companion(base / "qwen")), source(base / "words.py")
    return convert.convert_checkpoint("hpsv3", base / "HPSv3.safetensors", qwen, base / "reward", words)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> HPSv3:
    folder = converted(tmp_path_factory.mktemp("hpsv3"), published())
    return RewardConfig(score="hpsv3", ref=str(folder)).load()


def tensor(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(pictures(height, width))


def pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((255 * x).round().byte().permute(1, 2, 0).numpy()) for x in images]


def noise(height: int, width: int) -> torch.Tensor:
    """Images of hard edges, which a bicubic filter overshoots."""
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)).round()


@pytest.mark.parametrize("size", GOLDEN["scores"])
def test_scores_are_those_of_the_original_package(reward: HPSv3, size: str) -> None:
    with torch.no_grad():
        scores = reward(tensor(*map(int, size.split("x"))), GOLDEN["prompts"])
    rounding = size != "448x448"  # of the original's resized images to 1/255
    assert scores.tolist() == pytest.approx(GOLDEN["scores"][size], abs=1e-3 if rounding else 1e-4)


def test_scores_are_the_models_own(reward: HPSv3) -> None:
    """Through the processor, with the words that follow <|Reward|> in training, one position per token."""
    images = tensor(448, 448)  # not resized, so not rounded
    processor = Qwen2VLProcessor(reward.processor, reward.tokenizer, Qwen2VLVideoProcessor(), QWEN2_VL_CHAT)
    texts = ["".join(HPSV3_WORDS.values()).format(text_prompt=prompt) for prompt in PROMPTS]
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
    batch = processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats],
        images=pil(images),
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    length = batch.input_ids.shape[1]
    marks = batch.input_ids == reward.tokenizer.convert_tokens_to_ids("<|Reward|>")
    with torch.no_grad():
        states = reward.model(**batch, position_ids=torch.arange(length).expand(2, length)).last_hidden_state
        ours, expected = reward(images, PROMPTS), reward.head(states[marks])[:, 0]
        assert torch.allclose(ours, expected, atol=1e-4)
        placed = reward.head(reward.model(**batch).last_hidden_state[marks])[:, 0]
    assert (placed - expected).abs().min() > 1e-3  # transformers' own positions would give other scores


@pytest.mark.parametrize(
    "size", [(448, 448), (40, 56), (700, 500), (30, 900), pytest.param((1024, 1024), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", [tensor, noise])
def test_preprocessing_follows_the_processor(reward: HPSv3, kind, size: tuple[int, int]) -> None:
    images = kind(*size)
    expected = reward.processor(pil(images), return_tensors="pt")
    ours, grid = extract_patches(images, reward.processor)
    assert torch.equal(grid, expected.image_grid_thw)
    assert ours.shape == expected.pixel_values.shape
    # the processor rounds to 1/255 across and again down, and 1/255 is 0.015 after normalisation
    assert (ours - expected.pixel_values).abs().max() < 0.023


@pytest.mark.slow
def test_the_gradient_is_the_slope(reward: HPSv3) -> None:
    """In steps that are large against the float32 in which transformers keeps norms and rotations, so without kinks."""
    first, middle, last = (layer for layer in reward.head if isinstance(layer, nn.Linear))
    smooth = nn.Sequential(first, nn.Tanh(), middle, nn.Tanh(), last)
    double = HPSv3(reward.model.double(), smooth.double(), reward.processor, reward.tokenizer, reward.template)
    images = (0.1 + 0.8 * tensor(64, 48)).double().requires_grad_()
    (gradient,) = torch.autograd.grad(double(images, PROMPTS).sum(), images)
    direction = gradient.sign() * torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        up, down = (double(images + step * direction, PROMPTS).sum() for step in (1e-3, -1e-3))
    reward.model.float(), smooth.float()
    assert ((up - down) / 2e-3).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-3)
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.slow
def test_checkpointed_layers_change_no_gradient(reward: HPSv3) -> None:
    images = tensor(40, 56).requires_grad_()
    plain = Qwen2VLModel.from_pretrained(reward.model.name_or_path).eval()
    both = (reward, HPSv3(plain, reward.head, reward.processor, reward.tokenizer, reward.template))
    assert torch.equal(*(torch.autograd.grad(each(images, PROMPTS).sum(), images)[0] for each in both))
    assert not any(p.requires_grad for part in (reward.model, reward.head) for p in part.parameters())


@pytest.mark.slow
def test_in_bfloat16_a_score_and_its_gradient_are_float32(reward: HPSv3) -> None:
    """As on a GPU: the model rounds, the image and the head do not."""
    images = tensor(40, 56).requires_grad_()
    rough = Qwen2VLModel.from_pretrained(reward.model.name_or_path, dtype=torch.bfloat16).eval()
    results = []
    for each in (reward, HPSv3(rough, reward.head, reward.processor, reward.tokenizer, reward.template)):
        scores = each(images, PROMPTS)
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        results.append((scores.detach(), gradient.flatten()))
    (exact, slope), (scores, gradient) = results
    assert scores.dtype == gradient.dtype == torch.float32
    assert torch.allclose(scores, exact, atol=0.05)
    assert torch.cosine_similarity(slope, gradient, 0) > 0.9


def test_neither_neighbours_nor_padding_change_a_score(reward: HPSv3) -> None:
    images = tensor(40, 56)
    with torch.no_grad():
        together = reward(images, PROMPTS)
        alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
        swapped = reward(images, PROMPTS[::-1])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together - swapped).abs().min() > 1e-3


@pytest.mark.parametrize("token", [*QWEN2_VL_TOKENS, "<|Reward|>"])
def test_a_special_token_in_a_prompt_is_a_space(reward: HPSv3, token: str) -> None:
    """A second <|image_pad|> would ask for a second image, and what a removal joins must not be a token either."""
    given = [f"a{token}red circle", f"{token[:4]}{token}{token[4:]}"]
    with torch.no_grad():
        scores, expected = (
            reward(tensor(40, 56), texts) for texts in (given, ["a red circle", " ".join([token[:4], token[4:]])])
        )
    assert torch.equal(scores, expected)


# --- conversion -------------------------------------------------------------------------------------------------------


def test_a_converted_folder_holds_the_published_weights(reward: HPSv3) -> None:
    state = published()
    assert torch.equal(
        reward.model.language_model.layers[1].mlp.up_proj.weight, state["model.layers.1.mlp.up_proj.weight"]
    )
    assert torch.equal(reward.model.visual.merger.mlp[0].bias, state["visual.merger.mlp.0.bias"])
    assert torch.equal(reward.model.language_model.embed_tokens.weight, state["model.embed_tokens.weight"])
    assert torch.equal(reward.head[3].weight, state["rm_head.3.weight"])
    assert reward.processor.size["shortest_edge"] == reward.processor.size["longest_edge"] == IMAGE_AREA
    assert reward.tokenizer.convert_tokens_to_ids("<|Reward|>") == len(state["model.embed_tokens.weight"]) - 1


def test_precision_is_kept(tmp_path: Path) -> None:
    state = {k: v if k.startswith("rm_head.") else v.bfloat16() for k, v in published().items()}
    folder = converted(tmp_path, state)
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    reward = RewardConfig(score="hpsv3", ref=str(folder)).load()
    assert {reward.model.dtype, reward.head[0].weight.dtype} == {torch.float32}


def test_what_does_not_fit_is_refused(reward: HPSv3, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the score 'hpsv3' needs a 'qwen2_vl' model, this is a 'clip'"):
        RewardConfig(score="hpsv3", ref="builtin:shapes/heldout").load()
    qwen, file, words = companion(tmp_path / "qwen"), tmp_path / "HPSv3.safetensors", source(tmp_path / "words.py")
    with pytest.raises(UserError, match=r"no such file; download HPSv3\.safetensors of MizzenAI/HPSv3 first"):
        convert.convert_checkpoint("hpsv3", file, str(qwen), tmp_path / "out", words)
    save_file({k: v for k, v in published().items() if k != "visual.merger.ln_q.bias"}, file)
    with pytest.raises(UserError, match=r"not a checkpoint of hpsv3: visual\.merger\.ln_q\.bias is missing"):
        convert.convert_checkpoint("hpsv3", file, str(qwen), tmp_path / "out", words)
    with pytest.raises(UserError, match="holds a 'clip'; hpsv3 is made of Qwen2-VL-7B-Instruct"):
        convert.convert_checkpoint("hpsv3", file, str(hub.resolve("builtin:shapes/heldout")), tmp_path / "out", words)
    (qwen / "config.json").write_text(json.dumps(QWEN2_VL | {"hidden_size": 64}))
    with pytest.raises(UserError, match=r"the checkpoint has 264 tokens, 32 wide; .* has 264, 64 wide"):
        convert.convert_checkpoint("hpsv3", file, str(qwen), tmp_path / "out", words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["HPSv3.safetensors", "qwen", "words.py"]


def test_the_words_around_a_prompt_are_read_from_the_published_source(reward: HPSv3, tmp_path: Path) -> None:
    """As `str.format` would put them, up to <|Reward|>, from a file that cannot be run."""
    kept = json.loads((Path(reward.model.name_or_path) / "prompt.json").read_text())
    assert kept == {
        "before": "\nHow good is it {0 to 10}?  \nWanted - ",
        "after": "\n\n\nMarks: ",
    }
    spread = tmp_path / "spread.py"
    spread.write_text(
        "# coding: latin-1\nINSTRUCTION = 'un'\nINSTRUCTION = other = ('caf\xe9 ' '{text_prompt}')\n"
        "prompt_with_special_token = '<|Reward|>'\n",
        encoding="latin-1",
    )
    assert read_prompt_template(spread).model_dump() == {"before": "caf\xe9 ", "after": ""}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file; give hpsv3/dataset/data_collator_qwen.py"),
        (b"PK\x03\x04\x00", "cannot be read as Python"),
        (b"def", "cannot be read as Python"),
        (b"x = " + b"(" * 5000, "cannot be read as Python"),
        (b"#" * 2**19, "is larger than 262144 bytes"),
        (b"", "must set INSTRUCTION to a plain string with {text_prompt}"),
        ({"INSTRUCTION": "no place"}, "with {text_prompt} in it once"),
        ({"INSTRUCTION": "{text_prompt} {text_prompt}"}, "with {text_prompt} in it once"),
        ({"INSTRUCTION": "{{text_prompt}}"}, "with {text_prompt} in it once"),
        ({"INSTRUCTION": "{text_prompt:>9} {}"}, "with {text_prompt} in it once"),
        ({"INSTRUCTION": "{text_prompt} }"}, "with {text_prompt} in it once"),
        ({"prompt_with_special_token": "none"}, "prompt_with_special_token to one with <|Reward|>"),
        ({"prompt_with_special_token": "<|Reward|><|Reward|>"}, "prompt_with_special_token to one with <|Reward|>"),
    ],
)
def test_a_source_without_the_words_is_refused(tmp_path: Path, content: dict | bytes | None, said: str) -> None:
    file = tmp_path / "words.py"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        source(file, **content)
    (weights := tmp_path / "HPSv3.safetensors").touch()
    with pytest.raises(UserError, match=re.escape(said)) as error:
        convert.convert_checkpoint("hpsv3", weights, str(tmp_path), tmp_path / "out", file)
    assert str(error.value).startswith(str(file))
    assert not (tmp_path / "out").exists()


def test_the_words_belong_to_hpsv3(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs --prompt-source FILE, hpsv3/dataset/data_collator_qwen\.py"):
        convert.convert_checkpoint("hpsv3", tmp_path / "a", "b", tmp_path / "out")
    with pytest.raises(UserError, match=r"--prompt-source: is for hpsv3; hpsv2 puts"):
        convert.convert_checkpoint("hpsv2", tmp_path / "a", "b", tmp_path / "out", source(tmp_path / "words.py"))


@pytest.mark.parametrize("content", [None, "{}", '{"before": "a"}', '{"before": "a", "after": 1}'])
def test_a_folder_without_the_words_is_refused(reward: HPSv3, tmp_path: Path, content: str | None) -> None:
    folder = shutil.copytree(reward.model.name_or_path, tmp_path / "reward")
    (folder / "prompt.json").unlink()
    if content is not None:
        (folder / "prompt.json").write_text(content)
    with pytest.raises(UserError, match=r"no prompt\.json in it, .*convert-reward hpsv3 --prompt-source FILE.*again"):
        RewardConfig(score="hpsv3", ref=str(folder)).load()
