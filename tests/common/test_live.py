"""Bytes that tensors hold."""

import torch

from imgen_common.memory import LiveBytes


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
