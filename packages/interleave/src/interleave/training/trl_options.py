"""The `trl:` and `lora:` mappings: every option of theirs is open under its own name, but for those listed here."""

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from imgen_common.config.messages import shortened
from imgen_common.config.schema import union_members
from imgen_common.errors import UserError, nearest
from interleave.training.config import TrainingConfig

ANSWER_ONLY = "interleave trains on prompt and answer rows, and on the answer alone"
RESERVED: Mapping[str, str] = {
    "output_dir": "checkpoints go into the run folder; use --runs and --name",
    "remove_unused_columns": "rows are made as they are needed, from columns of their own",
    "resume_from_checkpoint": "use --resume RUN",
    "seed": "use the key seed",
    "model_init_kwargs": "the model is loaded by interleave; use the keys model, dtype and attention",
    "trust_remote_code": "code that comes with a model is never run",
    "save_only_model": "a run could not be resumed",
    "save_on_each_node": "checkpoints need one shared folder to be resumed",
    "overwrite_output_dir": "a run never overwrites another",
}
RESERVED_SFT: Mapping[str, str] = {
    **RESERVED,
    "max_length": "an example is never cut; use the key max_length, which leaves longer ones out",
    "truncation_mode": "an example is never cut; use the key max_length, which leaves longer ones out",
    "train_sampling_strategy": "rows are shuffled by seed, text-only and image rows in batches of their own",
    "chat_template_path": "prompts must be those of run time, made by the model's own chat template",
    "eos_token": "the end of turn is that of the model's own chat template",
    "pad_token": "the model's own is used",
    **dict.fromkeys(
        ("completion_only_loss", "assistant_only_loss", "dataset_text_field", "dataset_kwargs", "dataset_num_proc"),
        ANSWER_ONLY,
    ),
    **dict.fromkeys(
        ("packing", "padding_free", "eval_packing", "packing_strategy"), "TRL cannot pack rows with images"
    ),
}
RESERVED_GRPO: Mapping[str, str] = {
    **RESERVED,
    "reward_weights": "use the key reward_weights, which has their names",
    "max_tool_calling_iterations": "use the key max_attempts",
}
RESERVED_LORA: Mapping[str, str] = {
    "task_type": "it is CAUSAL_LM",
    "inference_mode": "an adapter is trained here",
    "base_model_name_or_path": "use the key model",
}

PLAIN = {bool: "true or false", int: "a whole number", float: "a finite number", type(None): "null"}
"""Kinds of values that an option is checked for, in words."""
NOT_NEGATIVE = ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm")
"""Options that optimizers refuse below 0, after the run has begun."""


def check_keys(section: str, given: Mapping[str, Any], known: set[str], owner: str) -> None:
    """Raises UserError for a key that `owner` does not have."""
    for key in given:
        if key not in known:
            raise UserError(f"{section}.{key}: unknown option of {owner}{nearest(key, known)}")


def check_reserved(section: str, given: Mapping[str, Any], owned: Mapping[str, str]) -> None:
    """Raises UserError for a key that interleave sets itself, with the reason."""
    for key in given:
        if key in owned:
            raise UserError(f"{section}.{key}: cannot be set, {owned[key]}")


def check_options(section: str, given: Mapping[str, Any], cls: type[Any], owned: Mapping[str, str]) -> None:
    """Raises UserError for a key that interleave sets itself or that `cls`, a dataclass of options, does not have."""
    check_reserved(section, given, owned)
    names = {field.name for field in dataclasses.fields(cls) if field.init}
    check_keys(section, given, names - set(owned), cls.__name__)


def check_values(given: Mapping[str, Any], cls: type[Any]) -> None:
    """Raises UserError for a number, a truth value or a choice that an option of TRL's `cls` cannot have.

    The class itself takes anything; texts, lists and mappings are left to it.
    """
    hints = get_type_hints(cls)
    for key, value in given.items():
        parts = set(union_members(hints[key]))
        choices = [one.value for part in parts if isinstance(part, type) and issubclass(part, Enum) for one in part]
        if key == "report_to":
            _check_trackers(value)
        elif choices and value not in choices:
            hint = nearest(str(value), choices)
            raise UserError(f"trl.{key}: is {shortened(value)}{hint}; allowed: {', '.join(choices)}")
        elif parts <= PLAIN.keys():
            allowed = " or ".join(words for kind, words in PLAIN.items() if kind in parts)
            try:
                TypeAdapter(hints[key], config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
            except ValidationError:
                raise UserError(f"trl.{key}: must be {allowed}, got {shortened(value)}") from None
            if key in NOT_NEGATIVE and value is not None and value < 0:
                raise UserError(f"trl.{key}: must be at least 0, got {value}")


def _check_trackers(given: object) -> None:
    """Raises UserError for a tracker that transformers does not know."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = ("none", "all", *INTEGRATION_TO_CALLBACK)
    for name in given if isinstance(given, list) else [given]:
        if name is not None and name not in known:
            raise UserError(
                f"trl.report_to: is {shortened(name)}{nearest(str(name), known)}; allowed: {', '.join(known)}"
            )


def build_lora_config(config: TrainingConfig) -> Any:
    """peft's LoraConfig, None without `lora`; adapters sit on all linear layers unless `lora` says otherwise, on the
    vision tower's only where `vision` is `train`.  Raises UserError for a key or value that peft does not take."""
    if config.lora is None:
        return None
    from peft import LoraConfig

    check_options("lora", config.lora, LoraConfig, RESERVED_LORA)
    if config.vision == "reference":
        raise UserError("vision: reference is of full training; with lora use frozen or train")
    options: dict[str, Any] = {"target_modules": "all-linear", **config.lora}
    if config.vision == "frozen":
        if "exclude_modules" in config.lora:
            raise UserError("lora.exclude_modules: cannot be set with vision: frozen; set vision: train")
        options["exclude_modules"] = VISION_MODULES
    try:
        return LoraConfig(task_type="CAUSAL_LM", **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"lora: {' '.join(str(error).split())}") from None


VISION_PARTS = ("visual", "vision_tower", "vision_model", "multi_modal_projector")
"""Names of vision towers, and of what joins them to the language model, in transformers."""
VISION_MODULES = rf"(?:.*\.)?(?:{'|'.join(VISION_PARTS)})\..*"
