"""Which model a command means, and on which prompts; found without importing torch, so that a typo costs no time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from flowbp.backbones import what_says_distilled
from flowbp.config import ExportFormat, TrainConfig
from flowbp.data.prompts import describe_unread_prompts, is_shapes_source, load_prompts
from imgen_common import hub, weights
from imgen_common.config import load
from imgen_common.errors import UserError, quoted
from imgen_common.files import read_json
from imgen_common.run_folder.checkpoints import find_checkpoints
from imgen_common.run_folder.data import DataHash, check_data, hash_adapter, hash_model, hash_rows, hash_weights
from imgen_common.run_folder.find import CONFIG, check_is_model, find_run, is_run
from imgen_common.run_folder.folder import CHECKPOINTS, RunFolder

if TYPE_CHECKING:
    import torch

    from flowbp.core.types import Backbone


WITH_EMBEDDED_GUIDANCE = ("FluxPipeline", "FluxKontextPipeline", "Flux2Pipeline")
"""Pipelines whose `guidance_scale` is an input of the network."""
WITH_ADDED_GUIDANCE = ("ZImagePipeline", "Krea2Pipeline")
"""Pipelines whose `guidance_scale` is one less than the factor of the guided velocity."""


class ExportedSampling(BaseModel):
    """The content of the sampling.json that `flowbp export` writes; null: not said."""

    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    max_sequence_length: int | None = None


OF_ONE_MODEL = ("lora", "eval.model", "model.ref")
"""Beginnings of keys that a run is not given for what another model is given."""


@dataclass(frozen=True)
class ModelSource:
    """The model of a configuration, or its `eval.model`, with the trained weights of `run` if there is one, else with
    the adapter of `lora.init`.  begun: the run that began with these, which must be the same still.  said: for a model
    the keys that its folder, its adapter or the user gave; None for a run, which has all.  step: the checkpoint of
    `run`, also if that goes on meanwhile; None: its last."""

    label: str
    config: TrainConfig
    run: Path | None
    begun: Path | None = None
    said: frozenset[str] | None = None
    step: int | None = None

    @property
    def eval_guidance_scales(self) -> tuple[float, ...]:
        """Those of an evaluation, the model's own first; those of `eval` alone where only they were said."""
        said = {"guidance_scale"} if self.said is None else self.said
        of_eval_alone = "guidance_scale" not in said and not said.isdisjoint(("eval", "eval.guidance_scale"))
        return self.config.eval.guidance_scale if of_eval_alone else self.config.eval_guidance_scales

    def check(self, *, scorers: bool = False) -> None:
        """Raises UserError if the model, or with `scorers` a reward, is missing or incomplete."""
        config = self.config
        for ref in (config.model.ref, config.eval.model, *(scorer.ref for scorer in config.scorers if scorers)):
            if ref is not None:
                hub.resolve(ref)

    def hashes(self) -> dict[str, DataHash]:
        """Hashes of the weights that `load` loads, by what they are; none of trained ones is a hash of its own."""
        config, found, what = self.config, dict[str, DataHash](), "what was trained (the run or lora.init)"
        for key, ref in (("model.ref", config.model.ref), ("eval.model", config.eval.model)):
            found |= {} if ref is None else hash_model(key, ref)
        found[what] = hash_rows([])
        if self.run is not None:
            saved = find_checkpoints(self.run / CHECKPOINTS)
            drawn = saved.get(self.step or max(saved, default=0))
            found[what] = hash_weights(file for file in sorted(drawn.rglob("*") if drawn else ()) if file.is_file())
        elif config.lora is not None and config.lora.init is not None:
            found |= hash_adapter(what, hub.resolve_adapter(config.lora.init, "lora.init"))
        return found

    def assumed_settings(
        self, size: int | None = None, steps: int | None = None, guidance_scale: float | None = None
    ) -> list[str]:
        """A sentence where a model is drawn with settings of the miniature, since nothing says others.

        size, steps, guidance_scale: what the command sets.
        """
        config, said = self.config, {*(self.said or ())}
        if self.said is None or config.model.ref.startswith(hub.BUILTIN):
            return []
        found: dict[str, tuple[float | None, float]] = {
            "model.height": (size, config.model.height),
            "model.width": (size, config.model.width),
            "eval.num_inference_steps": (steps, config.eval.num_inference_steps),
            "guidance_scale": (guidance_scale, config.guidance_scale),
        }
        said |= {"guidance_scale"} if {"eval", "eval.guidance_scale"} & said else set()
        assumed = [
            f"{key} {value:g}"
            for key, (given, value) in found.items()
            if given is None and not {key, key.partition(".")[0]} & said
        ]
        how = f"{config.model.ref} is drawn with {', '.join(assumed)}, the miniature's"
        return [f"{how}; give others with --set KEY=VALUE"] if assumed else []

    def unread_prompts(self, prompts: Sequence[str], *, scorers: bool = False) -> list[str]:
        """As `describe_unread_prompts` says of the model and, with `scorers`, of its rewards."""
        return describe_unread_prompts(
            prompts, self.config.model, {scorer.name: scorer for scorer in self.config.scorers if scorers}
        )

    def check_drawing(
        self, prompts: Sequence[str], size: tuple[int, int], steps: int, *, scorers: bool = False
    ) -> None:
        """Raises UserError, before any weights are read, where the model cannot be set up as the configuration says, or
        cannot draw these prompts, images of this (height, width), or in so many steps; with `scorers`, where a reward
        cannot score them."""
        from flowbp import backbones
        from flowbp.backbones.loading import check_same_shapes
        from flowbp.backbones.options import apply_model_options, check_machine
        from flowbp.data.edits import check_edits, check_scored

        model = self.config.model
        check_machine(model)
        backbone = backbones.init_empty_weights(
            model.ref, embedded_guidance=model.embedded_guidance, distilled=model.allow_distilled
        )
        if self.config.eval.model is not None:
            check_same_shapes(backbone.net, type(backbone.pipe), self.config.eval.model, "eval.model")
        apply_model_options(backbone, model)
        check_edits(prompts, backbone)
        backbone.sigmas(steps, size)
        backbone.latent_shape(size)
        check_scored((scorer.load("meta") for scorer in self.config.scorers if scorers), prompts)

    def load(self, device: "torch.device") -> "Backbone":
        """The backbone with its weights."""
        from flowbp.backbones.loading import load_backbone, load_eval_backbone, load_trained_weights
        from flowbp.backbones.lora import attach_adapter

        config = self.config
        if self.begun is not None:
            for key, ref in (("model.ref", config.model.ref), ("eval.model", config.eval.model)):
                check_data(self.begun, {} if ref is None else hash_model(key, ref))
        backbone = load_backbone(config, device, None if config.eval.model is None else "meta")
        if config.eval.model is not None:
            backbone = load_eval_backbone(config, backbone, device)
        if self.run is not None:
            load_trained_weights(backbone, self.run, self.step)
        elif config.lora is not None and config.lora.init is not None:
            if self.begun is not None:
                check_data(self.begun, hash_adapter("lora.init", hub.resolve_adapter(config.lora.init, "lora.init")))
            attach_adapter(backbone, config)
        return backbone


def model_source(text: str, root: Path, sets: Sequence[str] = (), *, base: bool = False) -> ModelSource:
    """The source that `text` names: a run (a folder, or its name under `root`) or a model reference.

    base: take the model that the run started from.  A model reference has the defaults of `TrainConfig`, or what the
    sampling.json says that `flowbp export` wrote into its folder, or into that of the adapter `lora.init`; `sets`
    change them.
    """
    if is_run(text, root):
        path = find_run(text, root, "flowbp train")
        config, recorded = load(TrainConfig, [path / CONFIG], sets), load(TrainConfig, [path / CONFIG])
        if config.lora != recorded.lora:
            raise UserError(f"lora: {path} has adapters of its own; leave it out, or name a model in the run's place")
        begun = path if _models(config) == _models(recorded) else None
        if base:
            return ModelSource(f"{path.name} (base)", config, None, begun)
        return ModelSource(path.name, config, path, begun, step=RunFolder.open(path, is_main=False).latest_checkpoint())
    check_is_model(text, root, "flowbp train")
    lora = load(TrainConfig, [], sets).lora
    adapter = None if lora is None or lora.init is None else hub.resolve_adapter(lora.init, "lora.init").parent
    of_adapter = [] if adapter is None else _as_sets(_size_and_length(read_sampling(adapter)))
    given = [*_own_settings(text), *of_adapter, *sets]
    config, said = load(TrainConfig, [], given), frozenset(one.partition("=")[0].strip() for one in given)
    config = config.model_copy(update={"model": config.model.model_copy(update={"ref": text})})
    return ModelSource(text, config, None, said=said)


def compared_sources(target: str, against: str | None, root: Path, sets: Sequence[str] = ()) -> list[ModelSource]:
    """What an evaluation of `target` compares, it last: with `against`, or a run with its base; a model alone.

    `sets` change all of them.  Two of the same pipeline are drawn alike, whichever is named first.
    """
    own = model_source(target, root, sets)
    if against is None:
        return [own] if own.run is None else [model_source(target, root, sets, base=True), own]
    other = _drawn_as(own, against, root, sets)
    compared = [other, own if own.run is not None else _drawn_as(other, target, root, sets, are_own=True)]
    if other.label == own.label:  # runs of one name in two folders
        compared = [replace(one, label=text) for one, text in zip(compared, (against, target), strict=True)]
    return compared


def check_compared(sources: Sequence[ModelSource], prompts: Sequence[str]) -> None:
    """As `ModelSource.check_drawing`, with the rewards, of models that are all drawn as the last one's `eval` says."""
    config = sources[-1].config
    for source in sources:
        size, steps = (config.model.height, config.model.width), config.eval.num_inference_steps
        source.check_drawing(prompts, size, steps, scorers=True)


def _drawn_as(source: ModelSource, text: str, root: Path, sets: Sequence[str], *, are_own: bool = False) -> ModelSource:
    """The source that `text` names, to be compared with another: if it is of the same pipeline, it draws as that does.

    A run takes the changes `sets`, of what is not of the other's own (its adapter and `eval.model`).  A model has the
    precision, the rescaling of guidance and, unless its sampling.json says others, the length of prompts and the
    embedded guidance of the other; are_own: unless `sets` say others.
    """
    own = sets if are_own else ()
    other, config = model_source(text, root, own), source.config
    refs = [one.config.model.ref for one in (source, other)]
    folders = [hub.resolve(ref, weights=False) for ref in refs]
    kinds = {hub.pipeline_index(*one).get("_class_name") for one in zip(refs, folders, strict=True)}
    if len(kinds) > 1:
        return other
    if other.run is not None:
        return model_source(text, root, [one for one in sets if not one.startswith(OF_ONE_MODEL)])
    said, rescale = other.config.model, config.guidance.rescale
    same: dict[str, object] = {"model.dtype": config.model.dtype, "guidance.rescale": rescale}
    same["model.max_sequence_length"] = said.max_sequence_length or config.model.max_sequence_length
    if _has_guidance_input(folders[1]):
        embedded = said.embedded_guidance
        same["model.embedded_guidance"] = config.model.embedded_guidance if embedded is None else embedded
    return model_source(text, root, [*(f"{key}={value}" for key, value in same.items() if value is not None), *own])


def _has_guidance_input(folder: Path) -> bool:
    return bool(weights.read_json(folder / "transformer" / "config.json", folder).get("guidance_embeds"))


def _own_settings(ref: str) -> list[str]:
    """What drawing with a model needs, as changes of a configuration: leave for one that is step-distilled, as nothing
    is trained, and how the run drew that it was exported from."""
    folder = hub.resolve(ref, weights=False)
    index = hub.pipeline_index(ref, folder)
    leave = ["model.allow_distilled=true"] if what_says_distilled(ref, index) else []
    own = read_sampling(folder)
    found = _size_and_length(own) | {"eval.num_inference_steps": own.num_inference_steps}
    kind = index.get("_class_name")
    if own.guidance_scale is not None and kind in WITH_EMBEDDED_GUIDANCE:
        if _has_guidance_input(folder):
            found["model.embedded_guidance"] = own.guidance_scale
    elif own.guidance_scale is not None:
        found["guidance_scale"] = own.guidance_scale + (kind in WITH_ADDED_GUIDANCE)
    return leave + _as_sets(found)


def read_sampling(folder: Path) -> ExportedSampling:
    """The sampling.json of a model or an adapter; one that says nothing where there is none."""
    file = folder / hub.SAMPLING_FILE
    return read_json(file, ExportedSampling) if file.exists() else ExportedSampling()


def _size_and_length(own: ExportedSampling) -> dict[str, float | None]:
    return {f"model.{name}": getattr(own, name) for name in hub.SIZE_AND_LENGTH}


def _as_sets(found: Mapping[str, float | None]) -> list[str]:
    return [f"{key}={value}" for key, value in found.items() if value is not None]


def _models(config: TrainConfig) -> tuple[str | None, ...]:
    return (config.model.ref, config.eval.model, config.lora.init if config.lora else None)


def check_export(run: Path, to: ExportFormat, step: int | None = None, model: str | None = None) -> None:
    """Raises UserError where a run has no checkpoint of `step` (None: any), or cannot be exported as `to`, or into
    `model`, or the weights to merge into are not those that were trained."""
    opened = RunFolder.open(run, is_main=False)
    config = opened.config(TrainConfig)
    if step is not None:
        opened.check_step(step)
    elif opened.latest_checkpoint() is None:
        raise UserError(f"{run}: no checkpoint yet; continue the run (flowbp train --resume {quoted(run)})")
    if config.lora is None and to != "merged":
        raise UserError(f"{run}: trained all weights, so there is no adapter to export; use --to merged")
    if model is not None and (config.lora is None or to != "merged"):
        raise UserError(f"--model {model}: only an adapter is merged into another model; use --to merged")
    if to == "merged":
        hub.resolve(model or config.model.ref)
        if model is None:
            check_data(run, hash_model("model.ref", config.model.ref))


def evaluation_prompts(config: TrainConfig) -> list[str]:
    """The prompts of the evaluation that `config.eval` describes."""
    return load_prompts(config.eval.prompts, config.data, config.eval.num_prompts)


def describe_left_out(config: TrainConfig) -> list[str]:
    """A sentence where the file of prompts of `config.eval` has more than are evaluated."""
    source, count = config.eval.prompts, config.eval.num_prompts
    if is_shapes_source(source) or len(load_prompts(source, config.data, count + 1)) <= count:
        return []
    return [f"{source}: only its first {count} prompts are evaluated; eval.num_prompts=N takes more"]


def check_guidance_scale(scale: float) -> None:
    """Raises UserError for a guidance scale out of range."""
    if not 0 < scale <= 100:
        raise UserError(f"--guidance-scale {scale:g}: must be above 0 and at most 100")
