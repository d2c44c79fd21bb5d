"""Sequences that begin alike as a tree, in which what they share is computed once.

The state of a token depends on the tokens before it and on nothing else, so tokens with the same history have the same
state: the system turn that a chat template puts before every prompt, the prompt of several completions, a completion
that was sampled twice. ``B`` sequences of ``n`` tokens that share ``s`` cost a forward ``s + B (n - s)`` tokens, and
their gradients add up in the shared ones by themselves.

In the order of their tokens, neighbours share the most: sequence ``k`` adds to the tree what follows the ``common[k]``
tokens that it begins with like the one before it. Its new tokens are laid behind those of the others, keep the position
that they have in their sequence, and attend to the tokens on their own path, by a mask ``[R, 1, W, W]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """Sequences ``[first, end)`` in the order of their tokens, laid out as a tree of ``size`` tokens."""

    first: int
    end: int
    size: int


@dataclass(frozen=True, slots=True)
class Sorted:
    """``B`` sequences in the order of their tokens."""

    ids: Tensor  # [B, L], -1 behind the end
    lengths: list[int]
    common: list[int]  # tokens that a sequence begins with like the one before it; 0 of the first
    order: Tensor  # [B], which sequence it is

    @property
    def nodes(self) -> int:
        """Tokens of one tree of all sequences."""
        return sum(self.lengths) - sum(self.common)

    def rows(self, capacity: int) -> Iterator[Row]:
        """Trees of at most ``capacity`` tokens of neighbours; a sequence that is longer gets one of its own."""
        first, size = 0, 0
        for k, (length, common) in enumerate(zip(self.lengths, self.common, strict=True)):
            if k > first and size + length - common > capacity:
                yield Row(first, k, size)
                first, size = k, 0
            size += length - (common if k > first else 0)
        yield Row(first, len(self.lengths), size)


def in_order(ids: Tensor, keep: Tensor) -> Sorted:
    """Sequences ``ids`` ``[B, L]``, of which ``keep`` holds what is no padding, sorted; on the CPU."""
    sequences = [row[kept].tolist() for row, kept in zip(ids.cpu(), keep.cpu(), strict=True)]
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    lengths = [len(sequences[i]) for i in order]
    left = torch.full((len(order), max(lengths, default=0)), -1)
    for k, i in enumerate(order):
        left[k, : lengths[k]] = torch.tensor(sequences[i], dtype=torch.int64)
    alike = (left[1:] == left[:-1]) & (left[1:] >= 0)
    common = [0, *alike.cumprod(-1).sum(-1).tolist()][: len(order)]
    return Sorted(left, lengths, common, torch.tensor(order, dtype=torch.int64))


def cheapest(sequences: Sorted, cost_of: Callable[[int, int], int]) -> tuple[int, list[Row]]:
    """The cheapest of a few ways to lay trees out, and its cost; ``cost_of(R, W)`` is that of ``R`` rows of ``W``."""
    best: tuple[int, list[Row]] | None = None
    rows = 1
    while best is None or rows < 2 * len(sequences.lengths):
        trees = list(sequences.rows(max(*sequences.lengths, -(-sequences.nodes // rows))))
        cost = cost_of(len(trees), max(tree.size for tree in trees))
        if best is None or cost < best[0]:
            best = cost, trees
        rows *= 2
    return best


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees in ``R`` rows of ``W`` tokens; gaps are tokens that attend to themselves, which nobody reads."""

    input_ids: Tensor  # [R, W]
    position_ids: Tensor  # [R, W]
    places: Tensor  # [B, L] of the sequences as they were given: where in the R * W a token is
    on_paths: list[Tensor]  # of each tree [S, N] bool: the tokens of its sequences
    owners: list[Tensor]  # of each tree [N]: which of its sequences added a token

    @property
    def attends(self) -> Tensor:
        """Whether the token of a row attends to that of a column, ``[R, 1, W, W]`` bool; computed anew each time, as
        it is the one thing here whose size is not that of the tokens."""
        rows, width = self.input_ids.shape
        attends = torch.eye(width, dtype=torch.bool, device=self.input_ids.device).repeat(rows, 1, 1)
        for row, positions, on_path, owner in zip(attends, self.position_ids, self.on_paths, self.owners, strict=True):
            reached = positions[: len(owner)]
            row[: len(owner), : len(owner)] = on_path[owner] & (reached <= reached[:, None])
        return attends[:, None]

    def to(self, device: torch.device) -> Forest:
        ids, positions, places = (t.to(device) for t in (self.input_ids, self.position_ids, self.places))
        of_trees = ([t.to(device) for t in tensors] for tensors in (self.on_paths, self.owners))
        return Forest(ids, positions, places, *of_trees)


def lay_out(sequences: Sorted, rows: Sequence[Row]) -> Forest:
    width = max(tree.size for tree in rows)
    ids, positions = torch.zeros((2, len(rows), width), dtype=torch.int64)
    places = torch.zeros_like(sequences.ids)
    on_paths, owners = [], []
    depth = torch.arange(sequences.ids.shape[1])
    for r, tree in enumerate(rows):
        owner = torch.zeros(tree.size, dtype=torch.int64)
        on_path = torch.zeros((tree.end - tree.first, tree.size), dtype=torch.bool)
        free = 0
        for k in range(tree.first, tree.end):
            length, common = sequences.lengths[k], sequences.common[k] if k > tree.first else 0
            path = torch.cat([places[k - 1, :common] - r * width, free + depth[: length - common]])
            places[k, :length] = path + r * width
            owner[free : free + length - common] = k - tree.first
            on_path[k - tree.first, path] = True
            ids[r, path], positions[r, path] = sequences.ids[k, :length], depth[:length]
            free += length - common
        on_paths.append(on_path)
        owners.append(owner)
    given = torch.empty_like(places)
    given[sequences.order] = places
    return Forest(ids, positions, given, on_paths, owners)


def tree_mask(attends: Tensor, dtype: torch.dtype, implementation: str) -> Tensor:
    """The mask as an attention implementation of transformers takes it: ``sdpa`` as it is, ``eager`` to be added."""
    if implementation == "sdpa":
        return attends
    return attends.new_zeros(attends.shape, dtype=dtype).masked_fill_(~attends, torch.finfo(dtype).min)
