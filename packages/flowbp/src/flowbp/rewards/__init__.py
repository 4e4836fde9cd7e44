"""Differentiable rewards: images in [0, 1] and prompts in, one score per image out; larger is better.

Knows nothing of backbones or training.  A new reward is one file here and one line in `REWARDS`.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import field_validator, model_validator

from imgen_common import hub
from imgen_common.config import Config
from imgen_common.errors import UserError, nearest
from imgen_common.files import local_path
from imgen_common.weights import read_json

if TYPE_CHECKING:
    import torch

    from flowbp.core.types import Reward


ConvertibleReward = Literal["hpsv2", "hpsv3", "imagereward", "aesthetic"]
PUBLISHED_FILES: dict[ConvertibleReward, str] = {
    "hpsv2": "HPS_v2.1_compressed.pt",
    "hpsv3": "HPSv3.safetensors of MizzenAI/HPSv3",
    "imagereward": "ImageReward.pt",
    "aesthetic": "sac+logos+ava1-l14-linearMSE.pth",
}
"""The file as which each reward is published, of those that `flowbp convert-reward` reads."""


PROMPT_SOURCE = "hpsv3/dataset/data_collator_qwen.py of the published package hpsv3 1.0.0"
"""Where the text is that HPSv3 puts around a prompt."""


class RewardType(NamedTuple):
    """Where the implementation of a score is, and which model it needs."""

    module: str
    """Module that is imported when a reward of this type is loaded."""
    class_name: str
    """Class in it, with a class method `load(folder, *, device, **options)` that returns a frozen `Reward`."""
    model_type: str | tuple[str, ...]
    """`model_type` that transformers writes into the model's config.json; those of all models that will do."""
    options: Mapping[str, Any] = MappingProxyType({})
    """Further arguments of `load`."""
    has_own_dtype: bool = False
    """Whether it is loaded in the precision of its publication, which `storage_dtype` cannot change."""


QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""The models of `vlm`, as in `flowbp.rewards.vlm.model`."""
REWARDS: dict[str, RewardType] = {
    "clip": RewardType("flowbp.rewards.clip", "ClipReward", "clip"),
    "clipscore": RewardType("flowbp.rewards.clip", "ClipReward", "clip", {"cosine": True}),
    "hpsv2": RewardType("flowbp.rewards.clip", "ClipReward", "clip", {"cosine": True, "letterbox": True}),
    "hpsv3": RewardType("flowbp.rewards.hpsv3", "HPSv3", "qwen2_vl", has_own_dtype=True),
    "aesthetic": RewardType("flowbp.rewards.clip", "AestheticReward", "clip"),
    "imagereward": RewardType("flowbp.rewards.image_reward", "ImageReward", "blip"),
    "edit_clip": RewardType("flowbp.rewards.clip", "EditClipReward", "clip"),
    "vlm": RewardType("flowbp.rewards.vlm.reward", "VlmReward", QWEN_VL, has_own_dtype=True),
}
"""Every reward by the name of its score."""


class RewardConfig(Config):
    """A reward model."""

    score: str = "clip"
    """How the model scores an image: `clip` exp(logit_scale) cosine (PickScore and the like), `clipscore` the cosine,
    `hpsv2` the cosine of padded images (HPSv2.1), `hpsv3` HPSv3, `aesthetic` the LAION predictor, `imagereward`
    ImageReward, `edit_clip` the direction of an edit, `vlm` what a vision-language model answers."""
    ref: str
    """Its folder: `builtin:...`, a path, or `org/name@revision`.  Convert published pickles first with
    `flowbp convert-reward`."""
    storage_dtype: Literal["float16"] | None = None
    """`float16`: weights are stored in half the memory and still compute in float32, so that scores keep about four
    digits.  For rewards that are only watched; one that is trained on saves less, as its gradient needs the float32
    weights of all layers at once.  null: float32; HPSv3 and vision-language models on a GPU bfloat16."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision in which its network is stored and computes; features are compared, and heads compute, in float32.
    null: float32; HPSv3 and vision-language models on a GPU bfloat16.  In bfloat16 scores keep about two digits, and
    gradients change with them: docs/results/perf.md has the figures of the miniature."""

    @field_validator("score")
    @classmethod
    def _score_is_known(cls, value: str) -> str:
        if value not in REWARDS:
            raise ValueError(f"unknown score {value!r}{nearest(value, REWARDS)}; allowed: {', '.join(REWARDS)}")
        return value

    @model_validator(mode="after")
    def _storage_can_be_chosen(self) -> "RewardConfig":
        if self.storage_dtype is not None and REWARDS[self.score].has_own_dtype:
            raise ValueError(f"storage_dtype: {self.score} has a precision of its own; set it to null")
        if self.storage_dtype is not None and self.dtype is not None:
            raise ValueError(
                f"dtype {self.dtype}: not with storage_dtype {self.storage_dtype}; set one of them to null"
            )
        return self

    def load(self, device: "torch.device | str" = "cpu") -> "Reward":
        """The same as `load_reward(self, device)`."""
        return load_reward(self, device)


def check_conversion(kind: ConvertibleReward, file: Path, companion: str, prompt_source: Path | None) -> None:
    """Raises UserError for what of `convert_checkpoint` is missing, or not for this kind; torch is not needed."""
    if prompt_source is not None and kind != "hpsv3":
        raise UserError(f"--prompt-source: is for hpsv3; {kind} puts no text around prompts")
    if prompt_source is None and kind == "hpsv3":
        raise UserError(f"hpsv3: needs --prompt-source FILE, {PROMPT_SOURCE}")
    if not file.is_file():
        raise UserError(f"{file}: no such file; download {PUBLISHED_FILES[kind]} first")
    if kind == "aesthetic":
        about = hub.resolve(companion) / "config.json"
        model_type = read_json(about).get("model_type") if about.exists() else None
        if model_type != "clip":
            what = f"is a {model_type!r} model" if model_type else "is no model of transformers"
            raise UserError(f"{companion}: {what}; aesthetic needs the CLIP of its head, openai/clip-vit-large-patch14")
    elif not local_path(companion).is_dir():  # a folder may hold a tokenizer alone
        hub.resolve(companion, weights=False)


def resolve_reward(config: RewardConfig, *, weights: bool = True) -> Path:
    """The folder of a reward, with its weights or without.  Raises UserError for a model of another type."""
    kind = REWARDS[config.score]
    try:
        folder = hub.resolve(config.ref, weights=False)
    except UserError as error:
        command = "interleave export-reward" if config.score == "vlm" else f"flowbp convert-reward {config.score}"
        is_made = config.score == "vlm" or config.score in PUBLISHED_FILES
        if not is_made or (local_path(config.ref) / "config.json").exists():
            raise
        what = f"{config.ref}: is not the folder of a reward" if local_path(config.ref).exists() else str(error)
        raise UserError(f"{what}; if that folder is yet to be made: `{command}`") from None
    about = folder / "config.json"
    model_type = read_json(about).get("model_type") if about.exists() else None
    allowed = (kind.model_type,) if isinstance(kind.model_type, str) else kind.model_type
    if model_type not in allowed:
        needed = " or ".join(map(repr, allowed))
        raise UserError(
            f"{config.ref}: the score {config.score!r} needs a {needed} model, this is a {model_type!r}; "
            f"scores are {', '.join(REWARDS)}"
        )
    return hub.resolve(config.ref) if weights else folder


def load_reward(config: RewardConfig, device: "torch.device | str" = "cpu") -> "Reward":
    """The frozen reward; on "meta" only headers of its weights are read, if they are there.

    Raises UserError for a model of another type, or whose weights do not fit it.
    """
    kind = REWARDS[config.score]
    folder = resolve_reward(config, weights=str(device) != "meta")
    reward_class = getattr(import_module(kind.module), kind.class_name)
    from flowbp.rewards.loading import compute_in, modules_of, store_in_float16

    if config.storage_dtype is None:
        reward: Reward = reward_class.load(folder, device=device, **kind.options)
        for module in modules_of([reward]) if config.dtype is not None else ():
            compute_in(module, config.dtype)
        return reward

    # made smaller before it goes to the device
    reward = reward_class.load(folder, device="meta" if str(device) == "meta" else "cpu", **kind.options)
    for module in modules_of([reward]):
        store_in_float16(module)
        module.to(device)
    return reward
