"""How much memory operations on tensors hold and how much they compute, counted with or without values in them."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry


def _scaled_mm_flops(a: Tensor, b: Tensor, *rest: Any, out_val: Tensor, **options: Any) -> int:
    """Of a product of matrices with scales, (m, k) and (k, n)."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


# torch counts `_scaled_mm` alone, and not the operation that its public `scaled_mm` calls
flop_registry.setdefault(torch.ops.aten._scaled_mm_v2, _scaled_mm_flops)


class FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations while it is active: `flops`, of which `recomputed` are those of forward
    passes that activation checkpointing repeats in a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.recomputed = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            number = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=found)
            self.flops += number
            # a backward pass computes with gradients disabled, but for what it repeats of a forward pass
            if torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1:
                self.recomputed += number
        return found


class LiveBytes(FlopCounter):
    """Counts the bytes of the storages that are made while it is active, too: `now`, the largest number so far `peak`.

    Operations are those that are computed, repeated ones included.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for one in known for t in pieces(one))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = super().__torch_dispatch__(func, types, args, kwargs)
        tree_map_only(Tensor, self._note, found)
        return found

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        self._change(storage.nbytes())
        weakref.finalize(storage, self._change, -storage.nbytes())

    def _change(self, by: int) -> None:
        self.now += by
        self.peak = max(self.peak, self.now)


def allocate(network: nn.Module, device: torch.device) -> None:
    """Gives a network on the meta device memory with undefined values; quantized weights do not support `to_empty`."""
    quantized = [
        (module, name, p)
        for module in network.modules()
        for name, p in module.named_parameters(recurse=False)
        if is_traceable_wrapper_subclass(p)
    ]
    for module, name, _ in quantized:
        module.register_parameter(name, None)
    network.to_empty(device=device)
    for module, name, p in quantized:
        module.register_parameter(name, nn.Parameter(_empty_like(p, device), requires_grad=False))


def _empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    """An uninitialized tensor like `tensor`, a quantized one part by part."""
    if not is_traceable_wrapper_subclass(tensor):
        return torch.empty_like(tensor, device=device)
    names, context = tensor.__tensor_flatten__()
    inner = {name: _empty_like(getattr(tensor, name), device) for name in names}
    return type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; a quantized one counts with its parts."""
    return sum(t.numel() * t.element_size() for tensor in tensors for t in pieces(tensor))


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a quantized tensor consists of; a plain tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from pieces(getattr(tensor, name))


def held(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The parameters and buffers of networks."""
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]
