"""What one update holds in passing, counted before any weight is read.

Weights and activations are torch's fake tensors, which have shapes and no content.  Token ids, masks and picture grids
are real ones, since models branch on them, and so is all that is computed of those alone.
"""

from collections.abc import Mapping, Sequence
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

from imgen_common.live import LiveBytes, allocate, held
from interleave.formats.rows import SftRow
from interleave.prompts import to_conversation
from interleave.store import PictureStore

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


def inputs_of(row: SftRow, processor: Any, store: PictureStore, batch: int, more: int) -> dict[str, Tensor]:
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
