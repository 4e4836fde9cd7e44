"""A critic as a folder that `flowbp` loads as a differentiable reward (`score: vlm`): its model and `reward.json`.

The products meet on disk only: docs/flowbp.md describes what is written here.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.files import atomic_folder
from imgen_common.weights import loading, read_json
from interleave.agents.prompts import (
    IMAGE_MARKER,
    PLACEHOLDER,
    Template,
    load_template,
    render_critic,
    render_verdict,
    without_reasoning,
)
from interleave.loop.config import ModelCritic, ModelPlanner, RunConfig, SelfCritic
from interleave.models.chat.endpoint import EndpointChatConfig
from interleave.models.chat.local import LocalChatConfig, bound_pixels
from interleave.protocols import CriticInput, HashedImage
from interleave.records import Verdict

REWARD_FILE = "reward.json"
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Models whose preprocessing flowbp differentiates."""
COPIED = (".json", ".jinja", ".safetensors", ".txt")
"""Suffixes of the files of a model that are copied: data, of which none can run code."""
SOURCE, IMAGE, PROMPT = "<source>", "<image>", "{prompt}"
"""Places in a reward's template."""
NUM_ANSWERS = 8
"""Answers for each image where the critic gives one."""


def export_reward(ref: str, config: RunConfig, out: Path) -> Path:
    """Writes the critic of a run's configuration, with the model `ref` as its model; returns `out`.

    The reward is the probability that an answer of the critic accepts the image; that of a critic with `parse_mode:
    direct`, which does not reason, is log p(true) / p(false) of its verdict.  As in a story the critic is shown the
    last source image, or a white one, and the prompt both as what was asked and as what the generator was given.
    Raises UserError for a critic that is no chat model or sees the story so far, a model that flowbp does not
    differentiate, and if `out` exists.
    """
    folder = hub.resolve(ref)
    settings, chat = reward_settings(config, folder), _chat_config(config)
    about = folder / "config.json"
    model_type = read_json(about).get("model_type") if about.exists() else None
    if model_type not in MODEL_TYPES:
        raise UserError(f"{ref}: a {model_type!r} model cannot be a reward; allowed: {', '.join(MODEL_TYPES)}")
    with atomic_folder(out) as fresh:
        for file in folder.iterdir():
            if file.suffix in COPIED and not file.name.startswith("."):
                shutil.copyfile(file, fresh / file.name)
        if isinstance(chat, LocalChatConfig) and chat.max_pixels is not None:
            _bound_images(fresh, chat.max_pixels)
        text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
        (fresh / REWARD_FILE).write_text(text, encoding="utf-8")
    return out


def reward_settings(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The content of `reward.json` for the critic of a run's configuration, whose model is in `folder`.

    Raises UserError as `export_reward`.
    """
    critic = config.critic
    if not isinstance(critic, ModelCritic | SelfCritic):
        raise UserError(f"critic.kind: {critic.kind}: is not a chat model that judges by a template; set it to model")
    if critic.context == "story":
        raise UserError("critic.context: story: a reward is shown single steps; choose a critic with context pair")
    chat = _chat_config(config)
    return {
        "template": reward_template(load_template(critic.template)),
        "max_sources": 1,
        "blank_source": True,
        "answer": _token_answer(folder) if critic.parse_mode == "direct" else _sampled_answer(critic, chat),
    }


def _sampled_answer(critic: ModelCritic | SelfCritic, chat: LocalChatConfig | EndpointChatConfig) -> dict[str, Any]:
    """How answers are sampled, and which accept."""
    num_samples = critic.num_samples if isinstance(critic, ModelCritic) else 1
    return {
        "kind": "sampled",
        "num_answers": num_samples if num_samples > 1 else NUM_ANSWERS,
        "max_new_tokens": chat.max_new_tokens,
        "temperature": chat.temperature or 1.0,
        # what `parsing.parse_verdict` takes for a verdict that accepts
        "accept": {
            "kind": "object",
            "key": "previous_step_success",
            "equals": True,
            "texts": ["refine_prompt"],
            "parse_mode": critic.parse_mode,
        },
    }


def reward_template(template: Template) -> str:
    """A critic's template with the places of a reward's.  Raises UserError for one that is not a critic's."""
    white = HashedImage.white(1, 1)
    render_critic(template, CriticInput(white, white, "", ""))
    for place in (SOURCE, PROMPT):
        if place in template.text:
            raise UserError(f"template {template.name}: remove {place}, which is a place in the template of a reward")
    before, *after = PLACEHOLDER.sub(PROMPT, template.text).split(IMAGE_MARKER)
    return before + SOURCE + after[0] + IMAGE + after[1] if after else SOURCE + IMAGE + before


def _chat_config(config: RunConfig) -> LocalChatConfig | EndpointChatConfig:
    """How the critic's model is asked."""
    judge = config.planner if isinstance(config.critic, SelfCritic) else config.critic
    chat = judge.model if isinstance(judge, ModelCritic | ModelPlanner) else None
    if not isinstance(chat, LocalChatConfig | EndpointChatConfig):
        raise UserError(
            "the critic has no model that samples answers; set critic.kind=model and critic.model.kind=local"
        )
    return chat


def _token_answer(folder: Path) -> dict[str, Any]:
    """The answer of a critic that does not reason, up to its verdict, and the tokens in which its verdicts differ."""
    from transformers import AutoTokenizer

    verdicts = [Verdict(success=success, refined_prompt="") for success in (True, False)]
    with loading(f"{folder}: has no tokenizer that can be loaded"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    answers = [without_reasoning(render_verdict(verdict)) for verdict in verdicts]
    ids = [tokenizer(answer, add_special_tokens=False).input_ids for answer in answers]
    start = next(i for i, (accepts, rejects) in enumerate(zip(*ids, strict=False)) if accepts != rejects)
    token, against = (tokenizer.decode(each[start]) for each in ids)
    return {"kind": "token", "prefix": tokenizer.decode(ids[0][:start]), "token": token, "against": [against]}


def _bound_images(folder: Path, max_pixels: int) -> None:
    """Makes the image processor of a folder scale larger images down, as `LocalChat` does."""
    from transformers import AutoProcessor

    with loading(f"{folder}: has no processor that can be loaded"):
        processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
    bound_pixels(processor, max_pixels, str(folder))
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    processor.save_pretrained(folder)
