"""Memory of one update, estimated before any weight is read.

The pass forward and back is traced on torch's fake tensors, which have shapes and no content.  Token ids, masks and
image grids stay real, since models branch on them, and so does all that is computed from those alone.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imgen_common import hub
from imgen_common.config.messages import shortened
from imgen_common.errors import UserError, nearest, one_line
from imgen_common.memory import LiveBytes, allocate, held
from imgen_common.weights import loading
from interleave.datasets.rows import SftRow
from interleave.models.chat.local import to_conversation
from interleave.storage.images import ImageStore
from interleave.training.config import TrainingConfig
from interleave.training.rows import num_tokens
from interleave.training.trained_weights import freeze_vision, is_frozen
from interleave.training.trl_options import build_lora_config

GIB = 2**30
UNLOADABLE = "{}: not a vision-language model that can be loaded"
aten = torch.ops.aten
FACTORIES = (aten.arange, aten.full, aten.linspace, aten.ones, aten.scalar_tensor, aten.zeros)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process, without a generator and a judge on the same machine.

    weights, gradients, optimizer: held all the time, and so is the reference model, which reinforcement learning with
    `beta` and without adapters needs.  activation: what a pass forward and back of `rows` rows of `length` tokens adds;
    None where the model cannot be traced.  kv_cache: keys and values of a rollout, freed before the updates begin.
    lora_layers: how many layers each of `lora.target_modules` stands for.
    """

    num_parameters: int
    num_trainable: int
    weights: int
    gradients: int
    optimizer: int
    reference: int = 0
    rows: int = 0
    length: int = 0
    activation: int | None = None
    kv_cache: int = 0
    lora_layers: Mapping[str, int] = field(default_factory=dict)

    @property
    def static(self) -> int:
        """Bytes held all the time."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def peak(self) -> int | None:
        """Most bytes held at once; None where the activations are not known."""
        return None if self.activation is None else self.static + max(self.activation, self.kv_cache)

    def lines(self) -> list[str]:
        """Sentences for a terminal."""
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        parts |= {"reference": self.reference} if self.reference else {}
        each = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        lines = [
            f"parameters: {self.num_parameters:,}, trainable: {self.num_trainable:,}",
            f"each process holds {self.static / GIB:.2f} GiB ({each})",
        ]
        what = f"the forward and backward pass of {self.rows} rows of {self.length:,} tokens"
        if self.lora_layers:
            lines.append(
                f"adapters: {', '.join(f'{target} {count}' for target, count in self.lora_layers.items())} layers"
            )
        if self.activation is None:
            return [*lines, f"{what} adds to that; this model cannot be traced, so the amount is not known"]
        lines.append(f"{what} adds {self.activation / GIB:.2f} GiB")
        if self.kv_cache:
            lines.append(f"the KV cache of a rollout adds {self.kv_cache / GIB:.2f} GiB before the updates")
        return [*lines, f"peak: {(self.peak or 0) / GIB:.2f} GiB, without a generator and a judge on the same machine"]


def estimate_static_memory(
    num_weights: int, num_trained: int, *, size: int, master: bool, stage: int, processes: int
) -> MemoryEstimate:
    """Memory of weights, gradients and AdamW.

    size: bytes of a weight.  master: DeepSpeed keeps a float32 copy of the trained weights.  stage: of ZeRO, 0 without;
    1 shards the optimizer's state, 2 the gradients too, 3 the weights too, as FSDP does.
    """
    share = {part: processes if stage >= part else 1 for part in (1, 2, 3)}
    kept = 12 if master else 2 * size
    return MemoryEstimate(
        num_parameters=num_weights,
        num_trainable=num_trained,
        weights=num_weights * size // share[3],
        gradients=num_trained * size // share[2],
        optimizer=num_trained * kept // share[1],
    )


def estimate_memory(
    config: TrainingConfig, processes: int, inputs: Mapping[str, Tensor], num_cached: int = 0
) -> MemoryEstimate:
    """Memory of training, estimated without the weights.

    inputs: of `build_inputs`.  num_cached: tokens of a rollout in the KV cache of a process.
    """
    model = build_meta_model(config)
    zero = int(zero_options(config.trl).get("stage", 0))
    fsdp = config.trl.get("fsdp")
    half = config.trl.get("bf16", bool(zero or fsdp) or torch.cuda.is_available())
    if zero and half:
        model.to(torch.bfloat16)
    elif config.dtype != "auto":
        model.to(getattr(torch, config.dtype))
    weights = list(model.parameters())
    size = weights[0].element_size()
    found = estimate_static_memory(
        sum(w.numel() for w in weights),
        sum(w.numel() for w in weights if w.requires_grad),
        size=size,
        master=zero > 0,
        stage=3 if fsdp else zero,
        processes=processes,
    )
    rows, length = inputs["input_ids"].shape
    options = read_json_options("trl.fsdp_config", config.trl.get("fsdp_config"))
    checkpointing = config.trl.get("gradient_checkpointing", True) or options.get("activation_checkpointing", False)
    activation = measure_activation(model, inputs, autocast=half and not zero, checkpointing=bool(checkpointing))
    targets = None if config.lora is None else config.lora.get("target_modules") or "all-linear"
    reference = found.weights if config.trl.get("beta") and config.lora is None else 0
    return replace(
        found,
        reference=reference,
        rows=rows,
        length=length,
        activation=activation,
        kv_cache=num_cached * _cached_bytes(model.config.get_text_config(), 2 if half else size),
        lora_layers={} if targets is None else layers_of_targets(model, targets),
    )


def _cached_bytes(text: Any, size: int) -> int:
    """Bytes of keys and values of one token in all layers of a text model; size: of a number."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head * size


def build_meta_model(config: TrainingConfig) -> Any:
    """The model on the meta device; its trainable weights require a gradient.

    Raises UserError where it is no vision-language model, or `lora` does not fit it.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    with loading(UNLOADABLE.format(config.model)), torch.device("meta"):
        about = AutoConfig.from_pretrained(hub.resolve(config.model, weights=False), local_files_only=True)
        model: Any = AutoModelForImageTextToText.from_config(about)
        if config.lora is None:
            freeze_vision(model, config.vision)
            return model
        from peft import get_peft_model

        options = build_lora_config(config)
        check_targets(config, model)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*did not match any targeted module", RuntimeWarning)
                return get_peft_model(model, options)
        # none is found, or peft has no adapter for a layer of this kind, or leaves an entry of a pattern out
        except (ValueError, NotImplementedError, re.error, RuntimeWarning) as error:
            # it shows the whole module
            said = re.sub(r"^Target module (\w+)\(.*\) is not", r"Target module \1 is not", str(error), flags=re.DOTALL)
            raise UserError(f"lora: {one_line(said)}; give names of linear layers, such as q_proj") from None


def check_adapters(config: TrainingConfig, *, has_images: bool = True) -> None:
    """Raises UserError where `lora` does not fit the model, or adapters of the vision tower would get no gradient.

    has_images: whether any row has an image; without one the tower gets none.  Re-entrant checkpointing passes no
    gradient to what is within a block whose inputs need none, as those of the tower do under adapters.
    """
    if config.lora is None:
        return
    model = build_meta_model(config)
    whole = model.get_base_model()
    # of a model with images the outer configuration decides; Qwen3-VL-8B's inner one has no such key
    if getattr(whole.config, "tie_word_embeddings", False) and hasattr(whole.get_input_embeddings(), "lora_A"):
        raise UserError(
            "lora.target_modules adapts the embeddings, which are one weight with the output layer of this model, so "
            "that merging the adapter would change that too; put embed_tokens into lora.modules_to_save instead"
        )
    _check_layers(config.lora, model.base_model.targeted_module_names)
    trained = [name for name, w in model.named_parameters() if w.requires_grad and is_frozen(name, config.vision)]
    if trained:
        raise UserError(
            f"lora trains {len(trained)} weights of the vision tower, {trained[0]} among them, with vision: frozen; "
            "set vision: train, or lora.bias: lora_only and lora.modules_to_save that are not in it"
        )
    in_tower = any(w.requires_grad and is_frozen(name, "frozen") for name, w in model.named_parameters())
    if in_tower and not has_images:
        raise UserError(
            f"lora adapts the vision tower, but no row of {config.data} has an image, so that it gets no gradient; set "
            "vision: frozen, or lora.target_modules that are not in it"
        )
    if in_tower:
        _check_checkpointing(config)


def _check_layers(lora: Mapping[str, Any], adapted: Sequence[str]) -> None:
    """Raises UserError for an entry of `layers_to_transform` that is the number of no adapted layer."""
    numbers, patterns = lora.get("layers_to_transform"), lora.get("layers_pattern") or [r"[^.]*"]
    wanted = [numbers] if isinstance(numbers, int) else numbers or []
    either = "|".join([patterns] if isinstance(patterns, str) else patterns)
    found = {int(match[1]) for name in adapted if (match := re.match(rf"(?:.*?\.)?(?:{either})\.(\d+)\.", name))}
    if missed := [number for number in wanted if number not in found]:
        there = f"{min(found)} to {max(found)}" if found else "none"
        raise UserError(f"lora.layers_to_transform: no adapted layer has the number {missed[0]}; there are {there}")


def _check_checkpointing(config: TrainingConfig) -> None:
    """Raises UserError where checkpointing would keep gradients from adapters of the vision tower."""
    checkpointing = config.trl.get("gradient_checkpointing", True) or config.trl.get("activation_checkpointing")
    options: dict[str, Any] = {}
    for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        options |= config.trl.get(key) or {}
    options.pop("selective", None)  # TRL's own
    # TRL makes checkpointing re-entrant under ZeRO-3, whatever is asked for; torch where options leave it open
    forced = zero_options(config.trl).get("stage") == 3
    reentrant = forced or (bool(options) and options.get("use_reentrant") in (None, True))
    if checkpointing and reentrant:
        raise UserError(
            "lora on the vision tower gets no gradient under re-entrant checkpointing"
            f"{', which TRL uses with ZeRO-3' if forced else ''}; set vision: frozen, or "
            + (
                "trl.gradient_checkpointing: false"
                if forced
                else "trl.gradient_checkpointing_kwargs.use_reentrant: false"
            )
        )


def check_targets(config: TrainingConfig, model: Any) -> None:
    """Raises UserError where an entry of `lora` names, by its end, no module or parameter of the model: peft leaves
    such entries out in silence."""
    given = config.lora or {}
    modules = [name for name, _ in model.named_modules() if not is_frozen(f"{name}.weight", config.vision)]
    parameters = [name for name, _ in model.named_parameters()]
    for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        entries = given.get(key)
        if entries is None or isinstance(entries, str) or (key != "target_modules" and not entries):
            continue
        known = parameters if key == "target_parameters" else modules
        missed = [t for t in entries if not any(name == t or name.endswith(f".{t}") for name in known)]
        if missed or not entries:
            ends = {name.rpartition(".")[2] for name in known}
            words = ", ".join(f"{t!r}{nearest(str(t), ends)}" for t in missed) or "any of them: []"
            where = " outside the frozen vision tower" if config.vision == "frozen" else ""
            what = "parameter" if key == "target_parameters" else "layer"
            raise UserError(f"lora.{key}: no {what}{where} has a name that ends with {words}")


def layers_of_targets(model: Any, given: str | Sequence[str]) -> dict[str, int]:
    """How many layers of a model of peft each of its target modules stands for."""
    names = model.base_model.targeted_module_names
    if isinstance(given, str):
        return {given: len(names)}
    return {target: sum(name == target or name.endswith(f".{target}") for name in names) for target in given}


def read_json_options(key: str, given: object) -> Mapping[str, Any]:
    """Options given as a mapping or as a JSON file; {} for None.  Raises UserError if the file cannot be read."""
    if given is None or isinstance(given, Mapping):
        return given or {}
    try:
        content = json.loads(Path(str(given)).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        where = "its path counts from the YAML file that gives it, or else from the working directory"
        raise UserError(f"{key} {given}: cannot be read ({error}); give a JSON file; {where}") from None
    if not isinstance(content, dict):
        raise UserError(f"{key} {given}: must hold a JSON object")
    return content


def zero_options(trl: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `zero_optimization` section of DeepSpeed's configuration; {} without.  Raises UserError as above, and for one
    that is none."""
    found = read_json_options("trl.deepspeed", trl.get("deepspeed")).get("zero_optimization", {})
    if not isinstance(found, Mapping) or found.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(
            f"trl.deepspeed.zero_optimization: must be a mapping with a stage from 0 to 3, got {shortened(found)}"
        )
    return found


# --- activations ------------------------------------------------------------------------------------------------------


class KeepKnownTensors(TorchDispatchMode):
    """Within a fake mode: an operation on real tensors alone stays real."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = not any(isinstance(tensor, FakeTensor) for tensor in given)
        if known and (given or func._overloadpacket in FACTORIES):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func._overloadpacket in INDEXING:
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        return func(*args, **kwargs)


def _places(index: Tensor | None) -> Sequence[Tensor | None]:
    """A real mask as the places it marks, since their number has to be known to index a fake tensor."""
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return (index,)
    with unset_fake_temporarily():
        return index.nonzero(as_tuple=True)


def build_inputs(
    rows: Sequence[SftRow], processor: Any, store: ImageStore, batch: int, more: int = 0
) -> dict[str, Tensor]:
    """Inputs of the model for `batch` copies of the longest row with its answer and `more` tokens after it."""
    row = max(rows, key=lambda row: num_tokens(row, processor, store))
    talk = to_conversation(row.message(store.get))
    if row.completion:
        talk.append({"role": "assistant", "content": [{"type": "text", "text": row.completion}]})
    made = processor.apply_chat_template(
        talk, tokenize=True, add_generation_prompt=not row.completion, return_dict=True, return_tensors="pt"
    )
    length = made["input_ids"].shape[1]
    fill = {"input_ids": int(made["input_ids"][0, -1]), "attention_mask": 1}
    padded = {
        name: torch.nn.functional.pad(value, (0, more), value=fill.get(name, 0))
        if value.shape[:2] == (1, length)
        else value
        for name, value in made.items()
    }
    return {name: value.repeat(batch, *[1] * (value.ndim - 1)) for name, value in padded.items()}


def measure_activation(model: Any, inputs: Mapping[str, Tensor], *, autocast: bool, checkpointing: bool) -> int | None:
    """Most bytes that a forward and backward pass of TRL's loss holds at once, beyond weights and gradients.

    model: on the meta device; it is changed.  inputs: of `build_inputs`; every token is scored.  None where the model
    branches on computed values, so that it cannot be traced.
    """
    from trl.trainer.utils import add_fused_lm_head

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))  # what TRL asks of its language-model head
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, KeepKnownTensors():
        allocate(model, device)
        model.train()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        pixels = {name: fake.from_tensor(value) for name, value in inputs.items() if value.is_floating_point()}
        try:
            with LiveBytes((*held([model]), *(weight.grad for weight in trained))) as live:
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    out = model(**{**inputs, **pixels}, labels=inputs["input_ids"], fused_lm_head=True)
                out.loss.backward()
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
            return None
    return live.peak
