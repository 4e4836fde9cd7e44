"""Bytes that tensors hold."""

import torch
from torch.utils.checkpoint import checkpoint

from imgen_common.memory import FlopCounter, LiveBytes


def test_what_is_alive_is_counted_once() -> None:
    known = torch.ones(1000)
    with LiveBytes([known]) as live:
        known.view(10, 100).mul_(1)  # nothing new: views and in-place results are no storage of their own
        for _ in range(3):
            x = torch.ones(1000) + 1
            x = x.view(10, 100).mul_(2)
    assert live.now == 4000  # the last one
    assert live.peak == 12000  # it, the ones and their sum
    del x
    assert live.now == 0


def test_what_checkpointing_computes_again_is_known() -> None:
    found, net = {}, torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    for name in ("kept", "again"):
        x = torch.ones(3, 8, requires_grad=True)
        with FlopCounter() as counter:
            (net(x) if name == "kept" else checkpoint(net, x, use_reentrant=False)).sum().backward()
        found[name] = counter
    layers = [2 * 3 * 8 * 16, 2 * 3 * 16 * 4]
    assert found["kept"].flops == 3 * sum(layers)  # forward, and the gradients of input and weights
    assert found["kept"].recomputed == 0
    assert found["again"].recomputed == layers[0]  # what the last layer gives is not needed again
    assert found["again"].flops == 3 * sum(layers) + layers[0]
