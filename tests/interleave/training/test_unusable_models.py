"""Models that no training can use: said in one line, before or at the first update."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from imgen_common import hub
from imgen_common.errors import UserError
from interleave.models.chat.local import LocalChat, LocalChatConfig
from interleave.training.config import SftConfig
from interleave.training.run import build_gradient_check, load_processor


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }"])
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


def test_a_gradient_that_is_not_finite_ends_the_run_before_a_weight_changes() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    check = build_gradient_check(model)
    model(torch.tensor([[1.0, float("nan")]])).sum().backward()
    arguments = SimpleNamespace(deepspeed=None, fsdp=None, fp16=False)
    with pytest.raises(UserError, match=r"update 1: the gradient of 0\.weight is not finite; check the weights"):
        check.on_pre_optimizer_step(arguments, SimpleNamespace(global_step=0), None)
