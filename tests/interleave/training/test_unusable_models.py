"""Models that no training can use: said in one line, before or at the first update."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from imgen_common import hub
from imgen_common.errors import UserError
from interleave.datasets.rows import SftRow
from interleave.models.chat.local import LocalChat, LocalChatConfig, check_processor
from interleave.protocols import HashedImage
from interleave.storage.images import ImageStore
from interleave.training.config import SftConfig
from interleave.training.rows import num_tokens
from interleave.training.run import load_processor
from interleave.training.trained_weights import build_gradient_check


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m.content }", "{% for m in messages %}{{ m.content }}{% endfor %}"]
)
def test_a_chat_template_that_cannot_be_used_is_said_at_once(template: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "critic"
    shutil.copytree(hub.resolve("builtin:shapes/critic"), folder)
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    said = "its chat template cannot be used; take a model for chat, or copy chat_template.jinja again"
    with pytest.raises(UserError, match=said):
        load_processor(SftConfig(model=str(folder)))
    with pytest.raises(UserError, match=said):
        LocalChat(LocalChatConfig(ref=str(folder)))


@pytest.mark.parametrize(("key", "tower"), [("patch_size", "patch_size"), ("merge_size", "spatial_merge_size")])
def test_images_must_be_cut_as_the_vision_tower_reads_them(key: str, tower: str, tmp_path: Path) -> None:
    folder = tmp_path / "critic"
    shutil.copytree(hub.resolve("builtin:shapes/critic"), folder)
    load_processor(SftConfig(model=str(folder)))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"][tower] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    said = rf"its image processor has {key} \d, its vision tower {tower} \d; copy preprocessor_config"
    with pytest.raises(UserError, match=said):
        load_processor(SftConfig(model=str(folder)))


def processor_of(image_processor: str) -> Any:
    """A processor with one of transformers' image processors."""
    return SimpleNamespace(
        image_processor=getattr(transformers, image_processor)(),
        tokenizer=lambda text, **_: SimpleNamespace(input_ids=[1, 2]),
        apply_chat_template=lambda *_, **__: "",
    )


@pytest.mark.parametrize("name", ["Gemma3ImageProcessor", "SmolVLMImageProcessor", "Qwen2VLImageProcessor"])
def test_a_processor_that_does_not_count_the_tokens_of_an_image_is_named(name: str, tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    shown = store.put(HashedImage.white(64, 64))
    given = processor_of(name)
    assert num_tokens(SftRow(texts=("a",), image_ids=(), completion="c"), given, store) == 2
    row = SftRow(texts=("a", "b"), image_ids=(shown,), completion="c")
    if name.startswith("Qwen"):
        assert num_tokens(row, given, store) == 2 + 4 - 1
        return
    with pytest.raises(UserError, match=rf"its {name} does not say how many tokens .* or train with max_length: null"):
        num_tokens(row, given, store)


@pytest.mark.parametrize(
    ("name", "tower"),
    [("PixtralImageProcessor", 16), ("Step3p7ImageProcessor", 14)],  # {"height", "width"}; the side of a tile
)
def test_only_processors_that_merge_patches_are_compared_with_the_tower(name: str, tower: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"patch_size": tower}}))
    given = processor_of(name)
    assert given.image_processor.patch_size != tower
    check_processor(given, tmp_path, "it")


def test_a_gradient_that_is_not_finite_ends_the_run_before_a_weight_changes() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    check = build_gradient_check(model)
    model(torch.tensor([[1.0, float("nan")]])).sum().backward()
    arguments = SimpleNamespace(deepspeed=None, fsdp=None, fp16=False)
    with pytest.raises(UserError, match=r"update 1: the gradient of 0\.weight is not finite; check the weights"):
        check.on_pre_optimizer_step(arguments, SimpleNamespace(global_step=0), None)
