"""The `trl:` and `lora:` mappings: every option of theirs is open under its own name, but for those listed here."""

import contextlib
import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from imgen_common.config.messages import shortened
from imgen_common.config.schema import union_members
from imgen_common.errors import UserError, nearest, one_line
from imgen_common.files import read_text
from imgen_common.run_folder.trackers import Tracker
from interleave.training.config import TrainingConfig

UPLOADS = (
    "nothing is uploaded while a run trains; upload the exported folder model/ afterwards, with HF_TOKEN in the "
    "environment"
)
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
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_model_id", "hub_strategy", "hub_revision"), UPLOADS),
    **dict.fromkeys(("hub_private_repo", "hub_always_push"), UPLOADS),
}
RESERVED_SFT: Mapping[str, str] = {
    **RESERVED,
    "max_length": "an example is never cut; use the key max_length, which leaves longer ones out",
    "truncation_mode": "an example is never cut; use the key max_length, which leaves longer ones out",
    "train_sampling_strategy": "rows are shuffled by seed, text-only and image rows in batches of their own",
    "chat_template_path": "prompts must be those of run time, made by the model's own chat template",
    "eos_token": "the end of turn is that of the model's own chat template",
    "pad_token": "the model's own is used",
    "pad_to_multiple_of": "TRL cannot pad prompts with images to it",
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
    "sync_ref_model": "the reference model is in no checkpoint, so that a run could not be resumed",
    "log_completions_hub_repo": UPLOADS,
    "eval_on_start": "there are no rows to evaluate on",
}
RESERVED_LORA: Mapping[str, str] = {
    "task_type": "it is CAUSAL_LM",
    "inference_mode": "an adapter is trained here",
    "base_model_name_or_path": "use the key model",
    "peft_type": "it is LORA",
    "trainable_token_indices": "not all models let single tokens be trained beside their tied embeddings",
    **dict.fromkeys(
        ("alora_invocation_tokens", "lora_bias", "layer_replication", "arrow_config", "use_bdlora"),
        "the adapters are merged into the model at the end, which PEFT cannot do with it",
    ),
    **dict.fromkeys(
        ("loftq_config", "eva_config", "corda_config", "lora_ga_config"), "it is of a start that is not taken here"
    ),
    **dict.fromkeys(
        ("megatron_config", "megatron_core", "runtime_config", "velora_config", "monteclora_config", "kasa_config"),
        "it was not tried here",
    ),
}
LORA_STARTS = (True, "gaussian", "orthogonal", "olora", "pissa", "mica")
"""PEFT's `init_lora_weights` that need no call of their own, leave the model as it is, and are the same each time, as
what changes the base's weights must be: they are drawn again where a run resumes, and where the adapters are merged."""

PLAIN = {bool: "true or false", int: "a whole number", float: "a finite number", type(None): "null"}
"""Kinds of values that an option is checked for, in words."""
BOUNDS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(
        (
            *("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "eval_steps"),
            *("eval_delay", "save_total_limit", "dataloader_num_workers", "data_seed", "neftune_noise_alpha"),
            *("beta", "epsilon", "epsilon_high", "top_k"),
        ),
        ("at least 0", lambda number: number >= 0),
    ),
    **dict.fromkeys(
        (
            *("dataloader_prefetch_factor", "per_device_eval_batch_size", "eval_accumulation_steps", "ddp_timeout"),
            *("torch_empty_cache_steps", "ddp_bucket_cap_mb", "num_generations_eval", "ref_model_sync_steps"),
            *("vllm_tensor_parallel_size", "vllm_max_model_length", "max_completion_length", "pad_to_multiple_of"),
        ),
        ("at least 1", lambda number: number >= 1),
    ),
    **dict.fromkeys(
        ("logging_steps", "temperature", "repetition_penalty", "delta", "vllm_server_timeout"),
        ("above 0", lambda number: number > 0),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), ("at least 0 and below 1", lambda number: 0 <= number < 1)),
    **dict.fromkeys(
        ("label_smoothing_factor", "min_p", "top_entropy_quantile", "ref_model_mixup_alpha"),
        ("from 0 to 1", lambda number: 0 <= number <= 1),
    ),
    **dict.fromkeys(
        ("top_p", "vllm_gpu_memory_utilization"), ("above 0 and at most 1", lambda number: 0 < number <= 1)
    ),
    **dict.fromkeys(("vllm_server_port", "vllm_group_port"), ("from 1 to 65535", lambda number: 1 <= number <= 65535)),
}
"""Bounds of numbers that the classes of options take and what they configure refuses, after the run has begun."""
CHOICES: Mapping[str, Sequence[str | bool]] = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "include_num_input_tokens_seen": ("all", "non_padding", "no", True, False),
    "vllm_mode": ("colocate", "server"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
"""Choices that TRL and transformers list in their documentation alone."""
FILES = ("deepspeed", "fsdp_config", "accelerator_config")
"""Options that are a mapping or the path of a file that holds it."""
NO_HARDWARE: Mapping[str, Any] = {
    **{"use_cpu": True, "bf16": False, "fp16": False, "bf16_full_eval": False, "fp16_full_eval": False, "tf32": None},
    **{"deepspeed": None, "fsdp": None, "fsdp_config": None, "torch_compile": False, "torch_compile_backend": None},
    **{"torch_compile_mode": None, "report_to": "none"},
}
"""What a machine without a GPU, and one process of many, can check the other options with."""


NAMES_OF_TRACKERS = ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
"""Options that transformers passes on to a tracker."""


class OptionsRefusedError(UserError):
    """TRL does not take the options, before anything is trained."""


@contextlib.contextmanager
def refusals_of_trl(where: str = "trl", has_begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """What TRL raises for options within it becomes an OptionsRefusedError; not once `has_begun` says that it trains.

    where: the option, where it is known.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, FileNotFoundError, ConnectionError) as error:
        if has_begun():
            raise
        said = one_line(str(error)) or type(error).__name__
        raise OptionsRefusedError(f"{where}: TRL refuses these options: {said}") from error


@contextlib.contextmanager
def refusals_of_trackers(reported: Sequence[str], has_begun: Callable[[], bool]) -> Iterator[None]:
    """What the package of a tracker of `report_to` raises within it, as without its server, becomes an
    OptionsRefusedError; not once `has_begun` says that it trains."""
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if has_begun() or package not in reported:
            raise
        said = one_line(str(error)) or type(error).__name__
        raise OptionsRefusedError(
            f"trl.report_to: {package} does not start ({said}); correct that, or leave it out"
        ) from error


def check_keys(section: str, given: Mapping[str, Any], known: set[str], owner: str) -> None:
    """Raises UserError for a key that `owner` does not have."""
    for key in given:
        if key not in known:
            raise UserError(f"{section}.{key}: unknown option of {owner}{nearest(key, known)}")


def check_spelling(given: Mapping[str, Any], owner: str) -> None:
    """Raises UserError for an option that no configuration of TRL or transformers declares.

    `check_options` knows which do, for which it imports them, in ten seconds; here their sources are only read.
    """
    places = {"trl": "trainer/*_config.py", "transformers": "training_args.py"}
    folders = {name: spec.submodule_search_locations or [] for name in places if (spec := find_spec(name))}
    files = [file for name, folder in folders.items() for file in Path(*folder).glob(places[name])]
    declared = {name for file in files for name in re.findall(r"^    (\w+):", read_text(file), re.MULTILINE)}
    check_keys("trl", given, declared or set(given), owner)


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
    """Raises UserError for a value that an option of TRL's `cls`, which itself takes anything, cannot have.

    Lists, and most of what stands in mappings, are left to TRL.
    """
    from transformers import GenerationConfig

    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in given.items():
        parts = set(union_members(hints[key]))
        choices = _choices(fields[key], parts)
        if value is None and NoneType in parts:
            continue
        if key == "report_to":
            _check_trackers(value, given)
        elif choices:
            if value not in choices:
                words = [str(one).lower() if isinstance(one, bool) else one for one in choices]
                hint = nearest(str(value), words)
                raise UserError(f"trl.{key}: is {shortened(value)}{hint}; allowed: {', '.join(words)}")
        elif parts <= PLAIN.keys():
            _check_plain(f"trl.{key}", value, hints[key])
            bound, holds = BOUNDS.get(key, ("", bool))
            if bound and not holds(value):
                raise UserError(f"trl.{key}: must be {bound}, got {value}")
        elif any((get_origin(part) or part) is dict for part in parts):
            if not isinstance(value, Mapping) and not (key in FILES and isinstance(value, str)):
                raise UserError(f"trl.{key}: must be a mapping, got {shortened(value)}")
            if isinstance(value, Mapping) and "use_reentrant" in value:  # torch takes anything, and "no" for true
                _check_plain(f"trl.{key}.use_reentrant", value["use_reentrant"], bool | None)
            if key == "generation_kwargs" and isinstance(value, Mapping) and not given.get("use_vllm"):
                check_keys(f"trl.{key}", value, set(vars(GenerationConfig())), "GenerationConfig")
                check_reserved(f"trl.{key}", value, {"stop_strings": "TRL gives generation no tokenizer to find them"})
        elif parts <= {str, NoneType} and key != "fsdp" and not isinstance(value, str):
            raise UserError(f"trl.{key}: must be a text, got {shortened(value)}")


def _choices(field: "dataclasses.Field[Any]", parts: set[Any]) -> list[str | bool]:
    """The values that an option may have: those of its enum, those it declares, or those of `CHOICES`."""
    of_enum = [one.value for part in parts if isinstance(part, type) and issubclass(part, Enum) for one in part]
    return of_enum or list(field.metadata.get("choices", CHOICES.get(field.name, ())))


def check_evaluation(given: Mapping[str, Any]) -> None:
    """Raises UserError for options of supervised training that need an evaluation, or a metric, that there is not."""
    is_evaluated, metric = given.get("eval_strategy", "no") != "no", given.get("metric_for_best_model")
    if given.get("save_strategy") == "best" and not is_evaluated:
        raise UserError("trl.save_strategy: best: nothing would be saved without evaluations; set trl.eval_strategy")
    if is_evaluated and metric not in (None, "loss", "eval_loss"):
        raise UserError(f"trl.metric_for_best_model: is {shortened(metric)}; allowed: eval_loss, which is measured")


def check_arguments(given: Mapping[str, Any], cls: type[Any], processes: int) -> None:
    """Raises UserError for options that TRL's `cls` refuses together, and for those of a schedule that cannot be built.

    Those of GPUs, vLLM and sharding are left out, so that a recipe for them can be planned anywhere, and no process
    group is joined.
    """
    import torch
    from transformers.optimization import get_scheduler

    class Arguments(cls):
        device = torch.device("cpu")
        world_size = processes

    if given.get("dataloader_persistent_workers") and not given.get("dataloader_num_workers"):
        raise UserError("trl.dataloader_persistent_workers: needs trl.dataloader_num_workers of at least 1")
    options = {key: value for key, value in given.items() if not key.startswith("vllm_") and key != "use_vllm"}
    with warnings.catch_warnings(), refusals_of_trl():
        warnings.simplefilter("ignore")
        arguments = Arguments(**{**options, **NO_HARDWARE})
    with warnings.catch_warnings(), refusals_of_trl("trl.lr_scheduler_kwargs"):
        warnings.simplefilter("ignore")
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = dict(arguments.lr_scheduler_kwargs or {})
        get_scheduler(arguments.lr_scheduler_type, optimizer, 0, 10**6, scheduler_specific_kwargs=schedule)


def _check_trackers(reported: object, given: Mapping[str, Any]) -> None:
    """Raises UserError for a tracker that transformers does not know, and for the name of a run or a project where all
    trackers have those of the run folder (`take_trackers`)."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known, names = ("none", "all", *INTEGRATION_TO_CALLBACK), reported if isinstance(reported, list) else [reported]
    for name in names:
        if name is not None and name not in known:
            raise UserError(
                f"trl.report_to: is {shortened(name)}{nearest(str(name), known)}; allowed: {', '.join(known)}"
            )
    ours = [name for name in get_args(Tracker) if name in names]
    named = next((key for key in NAMES_OF_TRACKERS if given.get(key) is not None), None)
    if named and ours and {*names} <= {*ours, "tensorboard"}:
        how = f"use --name for the run, and {ours[0].upper()}_PROJECT in the environment for the project"
        raise UserError(f"trl.{named}: cannot be set with {ours[0]}; {how}")


def check_vllm_installed(trl: Mapping[str, Any]) -> None:
    """Raises UserError where `use_vllm` is asked for and vllm is not installed."""
    if trl.get("use_vllm") and find_spec("vllm") is None:
        raise UserError("trl.use_vllm: vllm is not installed; install the extra `vllm` of interleave, or leave it out")


def check_trackers_installed(reported: Sequence[str]) -> None:
    """Raises UserError for a tracker of `report_to`, as TRL resolved it, whose package is missing: transformers finds
    that out once the run has begun."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    listed = {"azure_ml", "comet_ml", "dagshub", "dvclive", "mlflow", "neptune", "tensorboard", "wandb", "codecarbon"}
    listed |= {"clearml", "swanlab", "trackio", "kubeflow"}
    for name in reported:
        if name in listed & INTEGRATION_TO_CALLBACK.keys() and name not in get_available_reporting_integrations():
            raise UserError(f"trl.report_to: {name} is not installed; run: pip install {name}, or leave it out")


def take_trackers(arguments: Any) -> list[Tracker]:
    """Takes out of `report_to` those that a run folder reports to, as one run though it be resumed, which transformers
    does not."""
    taken: list[Tracker] = [name for name in get_args(Tracker) if name in arguments.report_to]
    arguments.report_to = [name for name in arguments.report_to if name not in taken]
    return taken


def _check_plain(name: str, value: object, hint: Any) -> None:
    """Raises UserError for a value of another type than `hint`, of types in `PLAIN`."""
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError:
        allowed = " or ".join(words for kind, words in PLAIN.items() if kind in union_members(hint))
        raise UserError(f"{name}: must be {allowed}, got {shortened(value)}") from None


def build_lora_config(config: TrainingConfig) -> Any:
    """peft's LoraConfig, None without `lora`; adapters sit on all linear layers unless `lora` says otherwise, on the
    vision tower's only where `vision` is `train`.  Raises UserError for a key or value that peft does not take."""
    if config.lora is None:
        return None
    from peft import LoraConfig

    check_options("lora", config.lora, LoraConfig, RESERVED_LORA)
    hints = get_type_hints(LoraConfig)
    for key, value in config.lora.items():
        if set(union_members(hints[key])) <= PLAIN.keys():  # PEFT takes anything, and "no" for true
            _check_plain(f"lora.{key}", value, hints[key])
            if key in ("r", "lora_alpha") and not value > 0:
                raise UserError(f"lora.{key}: must be above 0, got {value}; adapters would change nothing")
    start = config.lora.get("init_lora_weights", True)
    if start not in LORA_STARTS:
        allowed = ", ".join(map(str, LORA_STARTS)).lower()
        raise UserError(f"lora.init_lora_weights: {shortened(start)} cannot be trained from; allowed: {allowed}")
    options = copy.deepcopy({"target_modules": "all-linear", **config.lora})  # PEFT adds to lists
    if config.vision == "frozen":
        options["exclude_modules"] = VISION_MODULES
    try:
        return LoraConfig(task_type="CAUSAL_LM", **options)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"lora: {' '.join(str(error).split())}") from None


VISION_PARTS = ("visual", "vision_tower", "vision_model", "multi_modal_projector")
"""Names of vision towers, and of what joins them to the language model, in transformers."""
VISION_MODULES = rf"(?:.*\.)?(?:{'|'.join(VISION_PARTS)})\..*"


def print_lines(trainer: Any) -> None:
    """Where transformers would print what it logs as a Python dictionary: its main numbers as a line."""
    from transformers.trainer_callback import PrinterCallback

    class LinePrinter(PrinterCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            main = {name: value for name, value in logs.items() if "/" not in name and isinstance(value, int | float)}
            if state.is_local_process_zero:
                shown = ", ".join(f"{name} {value:.4g}" for name, value in main.items())
                print(f"update {state.global_step}/{state.max_steps}: {shown}", flush=True)

    if trainer.pop_callback(PrinterCallback) is not None:
        trainer.add_callback(LinePrinter)
