"""Memory of an update, before any weight is read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from imgen_common.errors import UserError
from imgen_common.memory import LiveBytes, allocate, held
from interleave.datasets.rows import SftRow
from interleave.models.chat.conversation import to_conversation
from interleave.storage.images import ImageStore
from interleave.training.config import TrainingConfig

if TYPE_CHECKING:
    from torch import Tensor


aten = torch.ops.aten
FACTORIES = (aten.arange, aten.full, aten.linspace, aten.ones, aten.scalar_tensor, aten.zeros)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put)


class RealWhereKnown(TorchDispatchMode):
    """Within a fake mode: what has content keeps it, as far as it meets nothing that has none."""

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
    """A known mask as the places it marks, whose number a fake tensor has to know."""
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return (index,)
    with unset_fake_temporarily():
        return index.nonzero(as_tuple=True)


def inputs_of(row: SftRow, processor: Any, store: ImageStore, batch: int, more: int) -> dict[str, Tensor]:
    """What a model is given for `batch` copies of a row, its answer and `more` tokens after it."""
    talk = to_conversation(row.message(store))
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


def passing_bytes(model: Any, inputs: Mapping[str, Tensor], *, autocast: bool, checkpointing: bool) -> int | None:
    """Most bytes that a pass forward and back of TRL's loss holds at once, beyond weights and gradients.

    model: on the meta device, changed by this.  inputs: of `inputs_of`; every token is scored.  None where the model
    branches on what it computes, so that it cannot be traced.
    """
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model.get_base_model() if hasattr(model, "peft_config") else model, outputs=OUTPUTS)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, RealWhereKnown():
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


OUTPUTS = ("log_probs", "entropy", "is_top1")
"""What TRL asks its language-model head for."""


GIB = 2**30


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.  weights, gradients, optimizer: held all the time, and so is the reference model of a
    reinforcement with `beta` and without adapters.  passing: what a pass forward and back
    of `rows` rows of `length` tokens holds beside, None where it cannot be told before.  cache: keys and values of a
    rollout, which is over when updates begin.  Generator and judge on the same machine come on top."""

    num_weights: int
    num_trained: int
    weights: int
    gradients: int
    optimizer: int
    reference: int = 0
    rows: int = 0
    length: int = 0
    passing: int | None = None
    cache: int = 0

    @property
    def total(self) -> int:
        """What is held all the time."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def peak(self) -> int | None:
        """The most that is held at once."""
        return None if self.passing is None else self.total + max(self.passing, self.cache)

    def told(self) -> list[str]:
        """In words."""
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        parts |= {"reference": self.reference} if self.reference else {}
        each = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        shown = [
            f"weights: {self.num_weights:,}, trained: {self.num_trained:,}",
            f"memory a process holds: {self.total / GIB:.2f} GiB ({each})",
        ]
        pass_ = f"{self.rows} rows of {self.length:,} tokens, forward and back"
        if self.passing is None:
            return [*shown, f"an update ({pass_}) holds more, which cannot be told for this model before it runs"]
        shown.append(f"an update holds {self.passing / GIB:.2f} GiB more: {pass_}")
        if self.cache:
            shown.append(f"a rollout holds {self.cache / GIB:.2f} GiB more: keys and values of its answers")
        return [*shown, f"at most {(self.peak or 0) / GIB:.2f} GiB; generator and judge on this machine come on top"]


def memory(num_weights: int, num_trained: int, *, size: int, master: bool, stage: int, processes: int) -> Memory:
    """What weights, gradients and AdamW hold.

    size: bytes of a weight.  master: DeepSpeed keeps the trained weights a second time in float32.  stage: of ZeRO, 0
    without; from 1 the optimizer's numbers are shared out, from 2 gradients, from 3 weights, as FSDP does too.
    """
    share = {part: processes if stage >= part else 1 for part in (1, 2, 3)}
    kept = 12 if master else 2 * size
    return Memory(
        num_weights=num_weights,
        num_trained=num_trained,
        weights=num_weights * size // share[3],
        gradients=num_trained * size // share[2],
        optimizer=num_trained * kept // share[1],
    )


def memory_of(
    config: TrainingConfig, folder: Path, processes: int, inputs: "Mapping[str, Tensor]", kept: int
) -> Memory:
    """That of a training of the model in `folder`, whose weights are not read.

    inputs: a micro-batch of the longest rows.  kept: how many tokens of a rollout a process keeps keys and values of.
    """
    import torch

    model = skeleton(folder, config)
    text = model.config.get_text_config()
    zero = int(zero_of(config.trl).get("stage", 0))
    fsdp = config.trl.get("fsdp")
    half = config.trl.get("bf16", bool(zero or fsdp) or torch.cuda.is_available())
    if zero and half:
        model.to(torch.bfloat16)
    elif config.dtype != "auto":
        model.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype])
    weights = list(model.parameters())
    size = weights[0].element_size()
    found = memory(
        sum(w.numel() for w in weights),
        sum(w.numel() for w in weights if w.requires_grad),
        size=size,
        master=zero > 0,
        stage=3 if fsdp else zero,
        processes=processes,
    )
    rows, length = inputs["input_ids"].shape
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * (2 if half else size)
    options = options_of_file("trl.fsdp_config", config.trl.get("fsdp_config"))
    checkpointing = config.trl.get("gradient_checkpointing", True) or options.get("activation_checkpointing", False)
    passing = passing_bytes(model, inputs, autocast=half and not zero, checkpointing=bool(checkpointing))
    reference = found.weights if config.trl.get("beta") and config.lora is None else 0
    return replace(found, reference=reference, rows=rows, length=length, passing=passing, cache=kept * token)


def skeleton(folder: Path, config: TrainingConfig) -> Any:
    """The model without numbers, with what is trained marked."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from interleave.training.trl_options import lora_config
    from interleave.training.vision import freeze

    about = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(about)
        if config.lora is None:
            freeze(model, config.vision)
        else:
            from peft import get_peft_model

            model = get_peft_model(model, lora_config(config.lora, config.vision))
    return model


def options_of_file(key: str, given: object) -> Mapping[str, Any]:
    """Options that TRL takes as a mapping or a JSON file; {} for None.  Raises UserError if it cannot be read."""
    if given is None or isinstance(given, Mapping):
        return given or {}
    try:
        content = json.loads(Path(str(given)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key} {given}: cannot be read ({error}); give a JSON file") from None
    if not isinstance(content, dict):
        raise UserError(f"{key} {given}: must hold a JSON object")
    return content


def zero_of(trl: Mapping[str, Any]) -> Mapping[str, Any]:
    """What DeepSpeed's configuration says of ZeRO; {} without.  Raises UserError if it cannot be read."""
    found: Mapping[str, Any] = options_of_file("trl.deepspeed", trl.get("deepspeed")).get("zero_optimization", {})
    return found
