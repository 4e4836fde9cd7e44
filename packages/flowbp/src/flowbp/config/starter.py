"""A commented configuration to start from: a recipe of configs/flowbp as one file, with a reward of choice."""

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flowbp.config import ModelConfig, TrainConfig
from imgen_common.config import dump_yaml, read_layers
from imgen_common.errors import UserError, nearest
from imgen_common.files import read_text

REWARDS: Mapping[str, Mapping[str, Any]] = {
    "hpsv2": {"score": "hpsv2", "ref": "rewards/hpsv2", "loss": {"kind": "hinge", "ceiling": 0.55}},
    "pickscore": {"score": "clip", "ref": "yuvalkirstain/PickScore_v1", "loss": {"kind": "hinge"}},
    "clipscore": {"score": "clipscore", "ref": "openai/clip-vit-large-patch14", "loss": {"kind": "hinge"}},
    "imagereward": {"score": "imagereward", "ref": "rewards/imagereward", "loss": {"kind": "hinge"}},
    "aesthetic": {"score": "aesthetic", "ref": "rewards/aesthetic", "loss": {"kind": "hinge"}},
    "hpsv3": {"score": "hpsv3", "ref": "rewards/hpsv3", "loss": {"kind": "hinge"}},
}
"""Sections of `rewards` by the name of a published reward model."""
CONVERTED: Mapping[str, str] = {
    "hpsv2": "HPS_v2.1_compressed.pt --with openai/clip-vit-large-patch14",
    "imagereward": "ImageReward.pt --with google-bert/bert-base-uncased",
    "aesthetic": "sac+logos+ava1-l14-linearMSE.pth --with openai/clip-vit-large-patch14",
    "hpsv3": "HPSv3.safetensors --with Qwen/Qwen2-VL-7B-Instruct --prompt-source data_collator_qwen.py",
}
"""Rewards that `flowbp convert-reward` must convert first: the published file, and the rest of the command."""
SOURCES: Mapping[str, str] = {
    "aesthetic": "christophschuhmann/improved-aesthetic-predictor on GitHub; see there for its license",
}
"""Where the file of a reward is published that no recipe names."""
PLACES = (Path("configs") / "flowbp", Path(__file__).absolute().parents[5] / "configs" / "flowbp")
"""Where the recipes are: below the working directory, or beside the packages of a clone."""
STARTERS = ("lora_*.yaml", "flowbp_bridge.yaml")
"""Recipes to start from: with adapters, and with all weights by the default method."""
WIDTH = 118


class Starter(NamedTuple):
    """A recipe, and the GPUs that its first lines say it is for: how many, and the GB (10^9 bytes) of each."""

    file: Path
    gpus: int
    gigabytes: int

    def __str__(self) -> str:
        return f"{self.file.name}, {self.gpus} GPU{'s' * (self.gpus != 1)} of {self.gigabytes} GB"


def find_starter(family: str, memory: int, gpus: int) -> Starter:
    """The largest recipe of a family that fits so many GPUs with so much memory each, in bytes.

    Raises UserError where there are no recipes, no such family, or none that fits.
    """
    folder = next((place for place in PLACES if place.is_dir()), None)
    if folder is None:
        raise UserError(
            "there are no recipes here: they are in configs/flowbp of the repository and not in the installed package; "
            "run this in the folder of a clone"
        )
    families = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and _starters(path)}
    if family not in families:
        raise UserError(
            f"--family {family!r}: no such family{nearest(family, families)}; allowed: {', '.join(families)}"
        )
    known = _starters(families[family])
    fitting = [one for one in known if one.gpus <= gpus and one.gigabytes * 1e9 <= memory]
    if not fitting:
        raise UserError(
            f"no recipe of {family} is for {gpus} GPU{'s' * (gpus != 1)} of {memory / 1e9:g} GB; there are: "
            f"{'; '.join(map(str, known))}; give --memory and --gpus of one of these"
        )
    return max(fitting, key=lambda one: (one.gpus, one.gigabytes))


def _starters(folder: Path) -> list[Starter]:
    """The recipes to start from that say for which GPUs they are, the smallest first."""
    found = []
    for file in sorted(file for pattern in STARTERS for file in folder.glob(pattern)):
        said = " ".join(_leading_comment(file)[:2])
        if match := re.search(r"(one|\d+) GPUs? of (\d+) GB", said):
            found.append(Starter(file, 1 if match[1] == "one" else int(match[1]), int(match[2])))
    return sorted(found, key=lambda one: (one.gpus, one.gigabytes))


def write_starter(name: str, starter: Starter, reward: str) -> str:
    """The recipe as the text of one YAML file: comments of the recipe, and above each key what it is.

    It is what `load` reads from the recipe but for `name`, and, with another reward, `rewards` and `heldout`.
    Raises UserError for an unknown reward.
    """
    if reward not in REWARDS:
        raise UserError(f"--reward {reward!r}: unknown{nearest(reward, REWARDS)}; allowed: {', '.join(REWARDS)}")
    data: dict[str, Any] = {}
    layers = list(read_layers(starter.file))
    for _, content in layers:
        data = _over(data, content)
    recipe_reward = data["rewards"][0]["name"]
    data |= {"name": name, "model": dict(ModelConfig.with_old_keys(data["model"]))}
    if reward != recipe_reward:
        data["rewards"] = [{"name": reward, **REWARDS[reward]}]
        watched = {one["name"]: one for one in data["heldout"]}
        if recipe_reward not in watched:
            plain = {key: value for key, value in REWARDS[recipe_reward].items() if key != "loss"}
            watched[recipe_reward] = {"name": recipe_reward, **plain, "storage_dtype": "float16"}
        data["heldout"] = [one for key, one in watched.items() if key != reward]
    blocks = [_head(starter, [file for file, _ in layers], reward, recipe_reward)]
    # in the order of the reference
    for key in sorted(data, key=list(TrainConfig.model_fields).index):
        lines = _comment(TrainConfig.model_fields[key].description or "")
        if key == "rewards" and reward in CONVERTED:
            file, _, rest = CONVERTED[reward].partition(" ")
            lines.append(f"# First: flowbp convert-reward {reward} downloads/{file} rewards/{reward} {rest}")
            lines += [f"# {file}: {SOURCES[reward]}"] if reward in SOURCES else []
        blocks.append([*lines, dump_yaml({key: data[key]}).rstrip()])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _head(starter: Starter, files: list[Path], reward: str, recipe_reward: str) -> list[str]:
    """The comments of a recipe; of those that it extends, what follows the first paragraph, on weights and prompts."""
    *parents, own = files
    lines = _leading_comment(own)
    for file in parents:
        comment = _leading_comment(file)
        lines += comment[comment.index("#") :] if "#" in comment else []
    if reward != recipe_reward:
        lines += [
            "#",
            *_comment(f"The memory was estimated with the reward {recipe_reward}, and {reward} was not tried."),
        ]
    place = f"configs/flowbp/{starter.file.parent.name}/{starter.file.name}"
    return [*lines, "#", f"# From {place}; keys that are not here have their defaults (docs/reference)."]


def _leading_comment(file: Path) -> list[str]:
    lines = read_text(file).splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:end]


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH, break_on_hyphens=False)]


def _over(old: Any, new: Any) -> Any:
    """Plain data over plain data, as `load` lays files over each other: a preset or another `kind` begins anew."""
    if not isinstance(old, dict) or not isinstance(new, dict) or "preset" in new:
        return new
    if "kind" in new and new["kind"] != old.get("kind"):
        return new
    return {**old, **{key: _over(old.get(key), value) for key, value in new.items()}}
