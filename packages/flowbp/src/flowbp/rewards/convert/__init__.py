"""Converts published reward checkpoints, most of them pickles, to safetensors folders that `load_reward` reads.

A pickle is read once, by torch's restricted unpickler (tensors and plain containers only).
"""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from flowbp.rewards import PUBLISHED_FILES, ConvertibleReward, check_conversion
from flowbp.rewards.convert.checkpoints import (
    check_width,
    check_words,
    head_weights,
    load_qwen2_vl_config,
    load_tokenizer,
    read_checkpoint,
)
from flowbp.rewards.convert.hpsv3 import read_prompt_template, save_hpsv3
from flowbp.rewards.convert.image_reward import EMBEDDINGS, save_image_reward
from flowbp.rewards.convert.open_clip import clip_from_open_clip, save_clip
from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.files import atomic_folder
from imgen_common.weights import HEAD_FILE


def convert_checkpoint(
    kind: ConvertibleReward, file: Path, companion: str, out: Path, prompt_source: Path | None = None
) -> Path:
    """Writes the folder of a reward; returns it.

    companion: reference to a folder with the tokenizer (hpsv2: that of any CLIP; imagereward:
    google-bert/bert-base-uncased; hpsv3: Qwen2-VL-7B-Instruct, whose configuration is read too), or for `aesthetic` to
    the CLIP ViT-L/14 that the head was trained on.
    prompt_source: for hpsv3 only, see `read_prompt_template`.
    Raises UserError if `out` exists, or if a file does not hold what `kind` says.
    """
    check_conversion(kind, file, companion, prompt_source)
    template = None if prompt_source is None else read_prompt_template(prompt_source)
    with atomic_folder(out) as fresh:
        state = read_checkpoint(file, PUBLISHED_FILES[kind])
        try:
            if kind == "hpsv2":
                model, tokenizer = clip_from_open_clip(state), load_tokenizer(companion)
                check_words(tokenizer, kind, model.config.text_config.vocab_size, companion)
                save_clip(model, tokenizer, fresh)
            elif template is not None:
                save_hpsv3(state, load_qwen2_vl_config(companion), load_tokenizer(companion), template, fresh)
            elif kind == "imagereward":
                tokenizer = load_tokenizer(companion)
                check_words(tokenizer, kind, len(state[EMBEDDINGS]), companion)
                save_image_reward(state, tokenizer, fresh)
            else:
                head, folder = head_weights(state, "layers."), hub.resolve(companion)
                check_width(head["0.weight"].shape[1], folder, companion)
                for part in folder.iterdir():
                    if part.suffix in (".json", ".txt", ".safetensors"):
                        shutil.copy(part, fresh)
                save_file(head, fresh / HEAD_FILE)
        except KeyError as error:
            raise UserError(f"{file}: not a checkpoint of {kind}: {error.args[0]} is missing") from None
    return out
