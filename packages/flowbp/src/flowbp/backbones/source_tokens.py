"""Source images beside the latents of a network that edits: how they are kept in a conditioning, and evaluated."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowbp.core.types import Cond, Layout

TOKENS, SIZES = "sources", "source_sizes"
"""Keys of a conditioning: tokens of a sample's sources, one after the other, padded with zeros to the longest sample,
(b, tokens, c); and rows and columns of each source's tokens, zeros where there is none, (b, sources, 2), on the CPU."""


def pack_sources(latents: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """The part of a conditioning that holds the sources of b samples; empty where no sample has any.

    latents: of each source of each sample, (c, rows, columns).
    """
    most = max((len(sample) for sample in latents), default=0)
    if not most:
        return {}
    rows = [torch.cat([one.flatten(1).T for one in sample]) if sample else None for sample in latents]
    some = next(row for row in rows if row is not None)
    tokens = some.new_zeros(len(rows), max(len(row) for row in rows if row is not None), some.shape[1])
    sizes = torch.zeros(len(rows), most, 2, dtype=torch.long)
    for i, (row, sample) in enumerate(zip(rows, latents, strict=True)):
        for k, one in enumerate(sample):
            sizes[i, k] = torch.tensor(one.shape[1:])
        if row is not None:
            tokens[i, : len(row)] = row
    return {TOKENS: tokens, SIZES: sizes}


def by_layout(
    velocity: Callable[[Tensor, Tensor, Cond, Layout], Tensor], x: Tensor, sigma: Tensor, cond: Cond
) -> Tensor:
    """`velocity` of samples whose sources may differ in number and size: one evaluation for each layout.

    Networks take one grid of positions for a whole batch, so that samples of different layouts cannot share one.
    """
    if SIZES not in cond:
        return velocity(x, sigma, cond, ())
    layouts = [tuple((r, c) for r, c in sample if r) for sample in cond[SIZES].tolist()]
    kinds = list(dict.fromkeys(layouts))
    if len(kinds) == 1:
        return velocity(x, sigma, cond, kinds[0])
    samples = [[i for i, layout in enumerate(layouts) if layout == kind] for kind in kinds]
    parts = [
        velocity(x[rows], sigma[rows], {name: value[rows] for name, value in cond.items()}, kind)
        for kind, rows in zip(kinds, samples, strict=True)
    ]
    return torch.cat(parts)[torch.tensor([i for rows in samples for i in rows]).argsort().to(x.device)]


def append_sources(tokens: Tensor, cond: Cond, layout: Layout) -> Tensor:
    """Tokens (b, n, c) of latents followed by those of their sources."""
    count = sum(rows * columns for rows, columns in layout)
    return torch.cat([tokens, cond[TOKENS][:, :count].to(tokens)], 1) if count else tokens


def with_sources(
    tokens: Tensor, ids: Tensor, cond: Cond, layout: Layout, positions: Callable[[int, int, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Tokens (b, n, c) of latents followed by those of their sources, and the position of each.

    positions(k, rows, columns): of the tokens of source k.
    """
    own = [positions(k, rows, columns) for k, (rows, columns) in enumerate(layout)]
    return append_sources(tokens, cond, layout), torch.cat([ids, *own])
