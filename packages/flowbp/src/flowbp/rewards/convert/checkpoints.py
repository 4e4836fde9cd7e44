"""Reading published checkpoints, and the tokenizers and configurations that they need."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPConfig, PreTrainedTokenizerBase, Qwen2VLConfig

from flowbp.rewards.loading import CHECKPOINT_LAYERS
from imgen_common import hub
from imgen_common.errors import UserError, one_line
from imgen_common.files import local_path
from imgen_common.weights import check_file, check_pointer, loading

StateDict = Mapping[str, Tensor]
GLOBAL = re.compile(r"GLOBAL (\S+)")
"""What torch says that a pickle would call."""


def read_checkpoint(file: Path, published: str = "the published checkpoint") -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the wrappers that trainers put around them.

    Raises UserError if there is no file, or if it holds anything but tensors in plain containers.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; download {published} first")
    check_pointer(file)
    if file.suffix == ".safetensors":
        check_file(file)
        return load_file(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        found = GLOBAL.search(str(error))
        why = f"it holds {found[1]}" if found else one_line(str(error), 120)
        raise UserError(
            f"{file}: cannot be read as tensors in plain containers ({why}), and anything else is not unpickled; give "
            f"{published} as it is published"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not (isinstance(content, dict) and all(isinstance(key, str) for key in content)):
        raise UserError(f"{file}: holds no tensors by name but a {type(content).__name__}; give {published}")
    return {key.removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}


def count_layers(state: StateDict, prefix: str) -> int:
    """Number of layers whose weights are named PREFIX0., PREFIX1., ..."""
    found = [re.match(re.escape(prefix) + r"(\d+)\.", key) for key in state]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def head_weights(state: StateDict, prefix: str) -> dict[str, Tensor]:
    """The weights of `scoring_head`, named as in its state dict."""
    return {
        f"{i}.{part}": state[f"{prefix}{layer}.{part}"].float().contiguous()
        for i, layer in enumerate(CHECKPOINT_LAYERS)
        for part in ("weight", "bias")
    }


def load_tokenizer(ref: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of `org/name`.  Raises UserError if there is none."""
    return _load_companion(AutoTokenizer, "tokenizer", ref)


def check_words(tokenizer: PreTrainedTokenizerBase, kind: str, rows: int, ref: str) -> None:
    """Raises UserError for a tokenizer that numbers words otherwise than that of the `rows` embeddings of a text model.

    CLIP's last two tokens begin and end a text; to the words of ImageReward's BERT, BLIP adds two tokens.
    """
    if kind == "hpsv2":
        fits = (tokenizer.bos_token_id, tokenizer.eos_token_id) == (rows - 2, rows - 1)
        needed = "that of a CLIP, such as openai/clip-vit-large-patch14"
    else:
        fits, needed = rows - len(tokenizer) in (0, 2), "google-bert/bert-base-uncased"
    if not fits:
        what = f"a {type(tokenizer).__name__} of {len(tokenizer)} tokens"
        raise UserError(f"{ref}: its tokenizer, {what}, is not that of {kind}, which has {rows}; give {needed}")


def check_width(width: int, folder: Path, ref: str) -> None:
    """Raises UserError unless the CLIP in a folder has features of a head's width."""
    with loading(f"{ref}: no configuration there"):
        given = CLIPConfig.from_pretrained(folder).projection_dim
    if given != width:
        raise UserError(
            f"{ref}: its features are {given} wide, the head reads {width}; give openai/clip-vit-large-patch14"
        )


def load_qwen2_vl_config(ref: str) -> Qwen2VLConfig:
    """The configuration of a Qwen2-VL, a folder or `org/name`.  Raises UserError if it is of another model, or none."""
    config = _load_companion(AutoConfig, "configuration", ref)
    if not isinstance(config, Qwen2VLConfig):
        raise UserError(f"{ref}: holds a {config.model_type!r}; hpsv3 is made of Qwen2-VL-7B-Instruct")
    return config


def _load_companion(auto_class: Any, what: str, ref: str) -> Any:
    folder = local_path(ref)
    if not folder.is_dir():  # one that is may hold a tokenizer alone
        folder = hub.resolve(ref, weights=False)
    with loading(f"{ref}: no {what} there"):
        return auto_class.from_pretrained(folder, local_files_only=True)
