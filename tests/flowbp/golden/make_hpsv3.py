"""Makes `hpsv3.json` with the original package, in an environment of its own: it needs an older transformers.

uv venv env && uv pip install --python env torch torchvision transformers==4.45.2 accelerate matplotlib pandas requests
env/bin/python make_hpsv3.py FOLDER_OF_THE_UNPACKED_hpsv3-1.0.0_WHEEL
"""

import json
import sys
import types
from importlib.metadata import version
from unittest.mock import MagicMock

import torch
from inputs import HPSV3_WORDS, QWEN2_VL, QWEN2_VL_CHAT, byte_tokenizer, pictures
from make import HERE, fill
from PIL import Image
from transformers import Qwen2TokenizerFast, Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor

PROMPTS = ["a red circle", "two blue crosses, {one} above the other"]
SIZES = ((448, 448), (40, 56), (700, 500))


def stub(name: str, **content: object) -> None:
    """Puts something in the place of a module that only training needs."""
    module = types.ModuleType(name)
    module.__getattr__ = lambda key: content.get(key, MagicMock())
    sys.modules[name] = module


def main(package: str) -> None:
    for name in ("trl", "peft", "fire", "omegaconf", "datasets", "torch.utils.tensorboard"):
        stub(name, RewardTrainer=object)
    sys.path.insert(0, package)
    from hpsv3 import inference
    from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT

    tokenizer = Qwen2TokenizerFast(tokenizer_object=byte_tokenizer(), pad_token="<|endoftext|>", padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    config = Qwen2VLConfig(**(QWEN2_VL | {"vocab_size": len(tokenizer)}), use_cache=False)
    config.pad_token_id = tokenizer.pad_token_id
    marks = tokenizer.convert_tokens_to_ids(["<|Reward|>"])
    model = Qwen2VLRewardModelBT(config, output_dim=2, special_token_ids=marks, rm_head_type="ranknet")
    shapes = fill(model)

    for name, text in HPSV3_WORDS.items():
        assert name in vars(inference)
        setattr(inference, name, text)
    inferencer = object.__new__(inference.HPSv3RewardInferencer)  # its __init__ loads 7B weights
    inferencer.device, inferencer.model, inferencer.use_special_tokens = "cpu", model, True
    inferencer.processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, chat_template=QWEN2_VL_CHAT)
    scores = {}
    for height, width in SIZES:
        images = [
            Image.fromarray((255 * x).round().astype("uint8").transpose(1, 2, 0)) for x in pictures(height, width)
        ]
        with torch.no_grad():
            scores[f"{height}x{width}"] = inferencer.reward(images, PROMPTS)[:, 0].tolist()
    made_with = {name: version(name) for name in ("torch", "transformers")} | {"hpsv3": "1.0.0"}
    content = {"made_with": made_with, "prompts": PROMPTS, "shapes": shapes, "scores": scores}
    (HERE / "hpsv3.json").write_text(json.dumps(content, indent=1) + "\n")
    print(scores)


if __name__ == "__main__":
    main(sys.argv[1])
