"""Checks before a training run that need no weights, and the arithmetic of an update.

What needs no torch is checked before torch is imported, so that a typo costs no time.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flowbp.backbones import check_family
from flowbp.config import DataConfig, TrainConfig
from flowbp.data.edits import Edit, check_edits, check_scored, describe_row, sources_of
from flowbp.data.prompts import describe_unread_prompts, load_prompts, load_quick_prompts
from flowbp.evaluation.sources import describe_left_out, read_sampling
from flowbp.rewards import resolve_reward
from imgen_common import devices, hub
from imgen_common.console import quiet_libraries
from imgen_common.errors import UserError
from imgen_common.files import free_bytes, nearest_existing
from imgen_common.run_folder.data import DataHash, hash_adapter, hash_model, hash_rows
from imgen_common.streams import numpy_generator

if TYPE_CHECKING:
    from flowbp.core.plan import Plan
    from flowbp.core.types import Backbone

TENSORS_PER_WEIGHT = 4
"""Tensors of a checkpoint per trained weight: itself, its average (EMA) and two moments."""
NUM_SAMPLED_PLANS = 64
"""Plans over which the cost of an update is averaged."""


class Prompts(NamedTuple):
    """The prompts of the training, of its evaluations before and after, and of the quick ones."""

    data: list[str]
    eval: list[str]
    quick: list[str]


@dataclass(frozen=True)
class CheckedRun:
    """A run that passed every check, with the plans of its first updates, the number of trained weights, its training
    prompts, and hashes of its data, of the adapter that it begins with and of the questions of its rewards.

    lora_layers: how many layers each of `lora.target_modules` stands for; empty without adapters.  sources: (height,
    width) of the source images, as the family prepares them, of the edit that has most of them; empty without edits.
    """

    config: TrainConfig
    num_processes: int
    sigmas: tuple[float, ...]
    plans: "tuple[Plan, ...]"
    num_weights: int
    prompts: Sequence[str]
    data: Mapping[str, DataHash]
    lora_layers: Mapping[str, int]
    sources: tuple[tuple[int, int], ...] = ()

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)


def check_run(
    config: TrainConfig, num_processes: int, *, estimate_only: bool = False, with_adapter: bool = True
) -> CheckedRun:
    """Checks everything that can be checked without loading weights, before anything is written.

    The configuration of the result has the rank, alpha and layers of the adapter that `lora.init` names.
    estimate_only: the run is not to be started here; weights, a GPU and optional packages may be missing.
    with_adapter=False: that adapter is not read, since the run goes on from a checkpoint.
    Raises UserError: a batch that does not divide, missing models, no prompts, more active steps than there are,
    image sizes, adapters or switches that do not fit the model.
    """
    prompts = check_inputs(config, num_processes, weights=not estimate_only, with_adapter=with_adapter)
    from flowbp.backbones.loading import layers_of_targets, mark_trainable
    from flowbp.backbones.lora import adopt_adapter
    from flowbp.core.plan import draw_plan

    quiet_libraries()
    size = (config.model.height, config.model.width)
    all_of_them = [*prompts.data, *prompts.eval, *prompts.quick]
    backbone = _check_models(config, all_of_them, weights=not estimate_only)
    sharded = config.distributed.kind in ("fsdp2", "zero3")
    layouts = check_edits(all_of_them, backbone, one_layout=sharded)
    sigmas = tuple(float(s) for s in backbone.sigmas(config.num_inference_steps, size, config.train_sigmas))
    plans = tuple(
        draw_plan(config.method, sigmas, numpy_generator(config.seed, "plan", update))
        for update in range(min(config.max_train_steps, NUM_SAMPLED_PLANS))
    )
    if config.lora is not None and with_adapter:
        lora = adopt_adapter(config.lora, backbone.net, type(backbone.pipe).__name__)
        config = config.model_copy(update={"lora": lora})
    layers = layers_of_targets(backbone.net, config.lora) if config.lora else {}
    _check_used(config, layers, backbone.unused_layers)
    num_weights = sum(p.numel() for p in mark_trainable(backbone.net, config).values())
    parts = {"data.prompts": prompts.data, "eval.prompts": prompts.eval}
    data = {key: hash_rows(map(describe_row, rows)) for key, rows in parts.items()}
    data |= {} if estimate_only else hash_settings(config)
    num_layers = {target: len(names) for target, names in layers.items()}
    return CheckedRun(config, num_processes, sigmas, plans, num_weights, prompts.data, data, num_layers, layouts[-1])


def hash_settings(config: TrainConfig) -> dict[str, DataHash]:
    """Hashes of the models that a run reads, and of the adapter that it begins with, if that is still there."""
    models = {"model.ref": config.model.ref, "eval.model": config.eval.model}
    models |= {f"the reward {scorer.name}": scorer.ref for scorer in config.scorers}
    found: dict[str, DataHash] = {}
    for key, ref in models.items():
        found |= {} if ref is None else hash_model(key, ref)
    if config.lora is not None and config.lora.init is not None:
        with suppress(UserError):  # a run goes on without it
            found |= hash_adapter("lora.init", hub.resolve_adapter(config.lora.init, "lora.init"))
    return found


def _check_used(config: TrainConfig, layers: Mapping[str, Sequence[str]], unused: tuple[str, ...]) -> None:
    """Raises UserError for a target module whose layers no image depends on, so that its adapters would stay zero.

    The adapter that `lora.init` names may have such layers: trainers train them, and they stay as they are.
    """
    if config.lora is not None and config.lora.init is not None:
        return
    for target, names in layers.items():
        if names and all(name.startswith(unused) for name in names):
            raise UserError(
                f"lora.target_modules {target!r}: no image depends on {names[0]}, so that nothing of it would be "
                "trained; take it out"
            )


def _check_models(config: TrainConfig, prompts: Sequence[str], *, weights: bool) -> "Backbone":
    """The generator on the meta device, with its options; with `weights`, those of all models are checked, and that
    the rewards can score the prompts.

    Only headers of files are read.
    """
    from flowbp import backbones
    from flowbp.backbones.loading import check_same_shapes
    from flowbp.backbones.options import apply_model_options, check_machine
    from flowbp.backbones.preview import load_preview
    from flowbp.backbones.rollout import check_rollout
    from flowbp.training.loading import load_rewards

    model = config.model
    backbone = backbones.init_empty_weights(
        model.ref, embedded_guidance=model.embedded_guidance, distilled=model.allow_distilled
    )
    if weights:
        check_machine(model)
        check_rollout(config.rollout)
        hub.check_networks(hub.resolve(model.ref))
        if model.vae.preview is not None:
            load_preview(backbone.pipe.vae, model.vae.preview, "meta")
        check_scored(load_rewards(config, "meta").values(), prompts)
    apply_model_options(backbone, model)
    if config.eval.model is not None:
        check_same_shapes(backbone.net, type(backbone.pipe), config.eval.model, "eval.model")
        if weights:
            hub.check_networks(hub.resolve(config.eval.model))
    return backbone


def all_prompts(config: TrainConfig) -> Prompts:
    """The prompts of a run.  Raises UserError as `load_prompts`, and where a column of images, captions or answers was
    named that no row fills."""
    data, evaluation = config.data, config.eval
    found = Prompts(
        load_prompts(config.data.prompts, data),
        load_prompts(evaluation.prompts, data, evaluation.num_prompts),
        load_quick_prompts(evaluation, data),
    )
    rows = [prompt for part in found for prompt in part if isinstance(prompt, Edit)]
    filled = {
        "images": any(row.sources for row in rows),
        "caption": any(row.caption != str(row) for row in rows),
        "source_caption": any(row.source_caption for row in rows),
        "answer": any(row.answer for row in rows),
    }
    usual = DataConfig()
    for key, is_filled in filled.items():
        column = getattr(data, key)
        if column not in (getattr(usual, key), None) and not is_filled:
            where = "row" if key in ("images", "answer") else "row with images"
            raise UserError(
                f"data.{key}: no {where} has anything under {column!r}; name the column that has it, or take "
                f"data.{key} out"
            )
    return found


def unread_prompts(config: TrainConfig) -> list[str]:
    """As `describe_unread_prompts` says of a run, and a sentence where it trains on edits and evaluates none, or where
    it evaluates as many prompts of a file as the miniature, and not all."""
    found = all_prompts(config)
    prompts = [prompt for part in found for prompt in part]
    notes = describe_unread_prompts(prompts, config.model, {scorer.name: scorer for scorer in config.scorers})
    evaluated = {"eval.prompts": found.eval, "eval.quick_prompts": found.quick}
    without = [key for key, part in evaluated.items() if part and not any(map(sources_of, part))]
    if without and any(map(sources_of, found.data)):
        notes.append(f"data.prompts has edits; set {' and '.join(without)}, without any, to edits too")
    notes += describe_left_out(config) if config.eval.num_prompts == TrainConfig().eval.num_prompts else []
    return [*notes, *_other_lengths(config)]


def _other_lengths(config: TrainConfig) -> Iterator[str]:
    """A sentence for the model and the adapter that an export says were drawn with another length of prompts."""
    from flowbp import backbones

    places = {"model.ref": hub.resolve(config.model.ref, weights=False)}
    with suppress(UserError):  # a run that goes on needs the adapter no more
        if config.lora is not None and config.lora.init is not None:
            places["lora.init"] = hub.resolve_adapter(config.lora.init, "lora.init").parent
    exported = {key: read_sampling(place).max_sequence_length for key, place in places.items()}
    used = config.model.max_sequence_length
    if used is None and any(exported.values()):
        used = backbones.init_empty_weights(config.model.ref, distilled=config.model.allow_distilled).max_tokens
    for key, length in exported.items():
        if length not in (None, used):
            yield (
                f"{key} was exported with {length} tokens of a prompt, this run reads {used}; "
                f"model.max_sequence_length={length} reads as many"
            )


def check_inputs(
    config: TrainConfig, num_processes: int, *, weights: bool = True, with_adapter: bool = True
) -> Prompts:
    """Checks the batch, the method's steps, models and prompts that the configuration names; returns the prompts.

    weights: whether those of the models must be there, with_adapter: the file of `lora.init`.  Raises UserError.
    """
    from flowbp.core.plan import draw_plan

    batch_sizes(config, num_processes)
    # steps that are too few for the method are too few at any noise levels
    levels = tuple(1 - step / config.num_inference_steps for step in range(config.num_inference_steps + 1))
    draw_plan(config.method, levels, numpy_generator(config.seed, "plan", 0))
    if config.lora is not None and config.lora.init is not None and with_adapter:
        hub.resolve_adapter(config.lora.init, "lora.init")
    for ref in (config.model.ref, config.eval.model):
        if ref is not None:
            check_family(ref, hub.resolve(ref, weights=False))  # before tens of gigabytes are downloaded
            hub.resolve(ref, weights=weights)
    for scorer in config.scorers:
        resolve_reward(scorer, weights=weights)
    if config.data.embeddings == "disk":
        _check_cache(Path(config.data.cache))
    return all_prompts(config)


def _check_cache(folder: Path) -> None:
    """Raises UserError where a file is in the folder's place, or it cannot be made; what is there may be read-only."""
    place = nearest_existing(folder)
    if not place.is_dir() or (place != folder.absolute() and not os.access(place, os.W_OK)):
        why = "cannot be written" if place.is_dir() else "is a file"
        raise UserError(f"data.cache {folder}: {place} {why}; name another folder, or set data.embeddings to memory")


class BatchSizes(NamedTuple):
    """Images per update: of one process, and of one of its micro-batches."""

    per_process: int
    per_device: int

    @property
    def gradient_accumulation_steps(self) -> int:
        """total_batch_size / (per_device_batch_size * processes)."""
        return self.per_process // self.per_device


def batch_sizes(config: TrainConfig, num_processes: int) -> BatchSizes:
    """How the global batch is divided.  Raises UserError if it does not divide evenly."""
    per_process, rest = divmod(config.total_batch_size, num_processes)
    if rest or not per_process:
        raise UserError(
            f"total_batch_size {config.total_batch_size} does not divide by {num_processes} processes; "
            "choose a multiple"
        )
    per_device = min(config.per_device_batch_size or per_process, per_process)
    if per_process % per_device:
        raise UserError(
            f"per_device_batch_size {per_device} does not divide {per_process}, the share of a process; "
            "choose a divisor"
        )
    return BatchSizes(per_process, per_device)


def keeps_working_copy(config: TrainConfig) -> bool:
    """Whether all weights are trained in bfloat16 and cast once per update."""
    model = config.model
    whole = config.lora is None and config.distributed.kind == "ddp" and not model.compile
    return whole and model.dtype == "bfloat16" and model.working_copy


def check_launcher(kind: str, environment: Mapping[str, str]) -> None:
    """Raises UserError if weights are to be sharded without a launcher, or a launcher is set to do it itself, or
    started one process where several were asked for."""
    kinds = {"FSDP": "distributed.kind=fsdp2", "DEEPSPEED": "distributed.kind=zero2 or zero3"}
    devices.check_launcher(environment, "flowbp train", kinds)
    if kind != "ddp" and "RANK" not in environment:
        raise UserError(
            f"distributed.kind {kind}: needs processes; start it with torchrun --nproc_per_node N -m flowbp train ..., "
            "or with accelerate launch"
        )


def check_disk(job: CheckedRun, folder: Path, *, resume: bool) -> None:
    """Raises UserError unless the disk of `folder` (or of its nearest parent) has room for the run's checkpoints."""
    updates, every, evaluated = job.config.max_train_steps, job.config.checkpoint.every, job.config.eval.every
    made = len({*range(0, updates, every), *range(0, updates, evaluated or updates)})  # 0 stands for the last update
    checkpoints = 1 if resume else min(made, job.config.checkpoint.keep + 1)
    needed = job.num_weights * 4 * TENSORS_PER_WEIGHT * checkpoints
    free = free_bytes(nearest_existing(folder))
    if free < needed:
        raise UserError(
            f"{folder}: no room for {checkpoints} checkpoints: {needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB "
            "free; make room, give another --runs, or train fewer weights (lora)"
        )


def update_arithmetic(job: CheckedRun) -> dict[str, Any]:
    """What an update costs, per update and image, averaged over the first plans of the run."""
    config = job.config
    batch = batch_sizes(config, job.num_processes)
    guided, detached = config.guidance_scale != 1, config.guidance.detach_negative
    active = sum(p.num_gradient_forwards for p in job.plans) / len(job.plans)
    plain = sum(p.num_plain_forwards for p in job.plans) / len(job.plans)
    kept = sum(len(p.keep_graphs(config.keep_graphs).graphs) for p in job.plans) / len(job.plans)
    jacobians = sum(term.coupling > 0 for p in job.plans for term in p.terms) / len(job.plans)
    regularised, branches = config.regularise is not None, 2 if guided else 1
    # a regulariser needs the values of the base and of the guided velocity, a detached negative branch with it
    of_regulariser = active * (branches + (guided and detached)) if regularised else 0
    active += jacobians if regularised else 0  # a coupled step has a pass of its own for the regulariser
    with_gradient = active * (2 if guided and not detached else 1)
    # where a graph is kept the rollout's evaluation has the gradient; a detached negative branch is evaluated beside it
    saved = kept * (2 if guided and not detached else 1)
    without = plain * branches + of_regulariser - saved
    return {
        "processes": job.num_processes,
        "images_per_update": config.total_batch_size,
        "images_per_process": batch.per_process,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "evaluations_per_image_with_gradient": with_gradient,
        "evaluations_per_image_without_gradient": without,
        "evaluations_per_update_with_gradient": with_gradient * config.total_batch_size,
        "evaluations_per_update_without_gradient": without * config.total_batch_size,
        "jacobians_per_image": jacobians,
        "updates": config.max_train_steps,
        "images": config.max_train_steps * config.total_batch_size,
        "prompts": job.num_prompts,
        "epochs": config.max_train_steps * config.total_batch_size / job.num_prompts,
        "trained_weights": job.num_weights,
        **({"lora_layers": dict(job.lora_layers)} if job.lora_layers else {}),
        "checkpoint_bytes": job.num_weights * 4 * TENSORS_PER_WEIGHT,
    }
