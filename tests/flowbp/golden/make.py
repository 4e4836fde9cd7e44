"""Makes `rewards.json` with the original packages, in an environment of its own (never in this workspace's).

    uv venv env && uv pip install --python env torch torchvision "numpy<2" transformers==4.36.2 timm==0.6.13 \\
        fairscale==0.4.13 open_clip_torch==2.24.0
    env/bin/python make.py FOLDER_OF_THE_UNPACKED_image_reward-1.5_WHEEL
"""

import importlib
import json
import sys
import types
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
import torchvision.transforms.functional as tv
from inputs import TOKENS, pictures, weights

HERE = Path(__file__).parent
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def fill(module: torch.nn.Module) -> dict[str, list[int]]:
    """Puts the named weights in; returns all shapes by name."""
    floats = {k: tuple(v.shape) for k, v in module.state_dict().items() if v.is_floating_point()}
    state = {k: torch.from_numpy(weights(k, shape)) for k, shape in floats.items()}
    module.load_state_dict(state, strict=False)
    module.eval()
    return {k: list(v.shape) for k, v in state.items()}


def letterbox(images: torch.Tensor, side: int) -> torch.Tensor:
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    if scale != 1:
        images = tv.resize(
            images, [round(height * scale), round(width * scale)], tv.InterpolationMode.BICUBIC, antialias=True
        )
        rows, columns = side - images.shape[-2], side - images.shape[-1]
        images = tv.pad(images, [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2])
    return tv.normalize(images, MEAN, STD)


def clip() -> dict:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    model = CLIP(
        16,
        CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=8, image_size=32),
        CLIPTextCfg(context_length=5, vocab_size=40, width=32, heads=4, layers=2),
    )
    shapes = fill(model)
    tokens = torch.tensor([[*row[:-1], 39] for row in TOKENS])
    scores = {}
    for height, width in ((32, 32), (40, 56)):
        with torch.no_grad():
            a = model.encode_image(letterbox(torch.from_numpy(pictures(height, width)), 32), normalize=True)
            b = model.encode_text(tokens, normalize=True)
        scores[f"{height}x{width}"] = (a * b).sum(-1).tolist()
    return {"shapes": shapes, "scores": scores}


def image_reward(package: Path) -> dict:
    for name in ("ImageReward", "ImageReward.models", "ImageReward.models.BLIP"):  # without their __init__
        module = types.ModuleType(name)
        module.__path__ = [str(package / name.replace(".", "/"))]
        sys.modules[name] = module
    med = importlib.import_module("ImageReward.models.BLIP.med")
    vit = importlib.import_module("ImageReward.models.BLIP.vit")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = med.BertConfig(
                vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                max_position_embeddings=16, type_vocab_size=2,
            )  # fmt: skip
            config.encoder_width, config.add_cross_attention, config.fusion_layer = 24, True, 0
            self.blip = torch.nn.Module()
            self.blip.visual_encoder = vit.VisionTransformer(
                img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=4,
                norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            )  # fmt: skip
            self.blip.text_encoder = med.BertModel(config=config, add_pooling_layer=False)
            widths = (32, 1024, 128, 64, 16, 1)
            layers = [torch.nn.Linear(a, b) for a, b in pairwise(widths)]
            drop = torch.nn.Identity()
            self.mlp = torch.nn.Module()
            self.mlp.layers = torch.nn.Sequential(
                layers[0], drop, layers[1], drop, layers[2], drop, layers[3], layers[4]
            )

    model = Model()
    shapes = fill(model)
    tokens = torch.tensor(TOKENS)
    scores = {}
    for height, width in ((32, 32), (40, 56)):
        images = torch.from_numpy(pictures(height, width))
        if height != 32:
            images = tv.center_crop(tv.resize(images, 32, tv.InterpolationMode.BICUBIC, antialias=True), 32)
        with torch.no_grad():
            seen = model.blip.visual_encoder(tv.normalize(images, MEAN, STD))
            read = model.blip.text_encoder(
                tokens, attention_mask=torch.ones_like(tokens), encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long), return_dict=True,
            ).last_hidden_state  # fmt: skip
            raw = model.mlp.layers(read[:, 0])[:, 0]
        scores[f"{height}x{width}"] = ((raw - 0.16717362830052426) / 1.0333394966054072).tolist()
    return {"shapes": shapes, "scores": scores}


if __name__ == "__main__":
    made = {"open_clip": clip(), "image_reward": image_reward(Path(sys.argv[1]))}
    versions = {name: version(name) for name in ("torch", "transformers", "open_clip_torch", "timm")}
    content = {"made_with": versions | {"image_reward": "1.5"}, **made}
    (HERE / "rewards.json").write_text(json.dumps(content, indent=1) + "\n")
    print({name: one["scores"] for name, one in made.items()})
