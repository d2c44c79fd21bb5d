"""Sequences laid end to end, so that a forward computes tokens and no padding; and micro-batches bounded by tokens.

``B`` sequences of lengths ``n_b``, padded, cost a forward ``B (max prompt + max completion)`` tokens. Laid end to end
in rows they cost ``sum_b n_b`` and what stays free at the ends of the rows. Position ids that restart at 0, with no
attention mask, tell transformers where a sequence begins, and attention stays inside it: the states are those of each
sequence alone, up to rounding. A model that reads position ids otherwise would mix sequences in silence, so every model
is asked first (:func:`keeps_sequences_apart`), and one that fails is given padded micro-batches.

How wide is a row? Eager and sdpa attention compute the pairs that the mask hides, so a row of width ``W`` costs a layer
of hidden size ``D`` about ``24 D^2 W`` operations in its matrices (of ``12 D^2`` weights) and ``4 D W^2`` in attention,
and ``R`` rows cost, up to a constant, ``R W (6 D + W)``: few wide rows have no gaps, many narrow ones waste no
attention. The cheapest of both is taken. flash-attn computes no hidden pair: there one row holds everything.

Measured on one thread of a CPU for a random model of SmolLM2-135M's size with LoRA, 16 prompts of 15 to 45 tokens with
completions of 4 to 48, micro-batches of 4 (process time, the better of two runs): scoring 14.0 s for 18.7 s padded, the
update 15.7 s for 20.7 s, a quarter less each; with at most 400 tokens in a micro-batch 13.2 and 17.0 s, for 16.1 and
17.9 s of padded ones sorted by length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srppo import distributed, sharding

if TYPE_CHECKING:
    from srppo.config import SRPPOConfig
    from srppo.roles import Role
    from srppo.rollout import Rollout


def fill(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins of at most ``capacity``, few of them: first-fit decreasing, ties in their order.

    What is longer than ``capacity`` gets a bin of its own.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((b for b, room in enumerate(free) if room >= lengths[index]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            free.append(capacity)
        bins[place].append(index)
        free[place] -= lengths[index]
    return bins


@functools.lru_cache(maxsize=4096)  # each micro-batch of a rollout goes through all roles and epochs
def plan(lengths: tuple[int, ...], hidden_size: int, one_row: bool) -> tuple[int, tuple[int, ...]]:
    """The width of the rows, and the place of each sequence's first token: ``row * width + offset``."""
    longest, total = max(lengths), sum(lengths)
    best: tuple[int, int, list[list[int]]] | None = None
    rows = 1
    while best is None or (not one_row and rows < 2 * len(lengths)):
        bins = fill(lengths, max(longest, -(-total // rows)))
        width = max(sum(lengths[i] for i in members) for members in bins)
        cost = len(bins) * width * (6 * hidden_size + width)
        if best is None or cost < best[0]:
            best = cost, width, bins
        rows *= 2
    _, width, bins = best
    starts = [0] * len(lengths)
    for row, members in enumerate(bins):
        place = row * width
        for index in members:
            starts[index] = place
            place += lengths[index]
    return width, tuple(starts)


@dataclass(frozen=True, slots=True)
class Packed:
    """A rollout's tokens in ``R`` rows of ``W``, gaps filled with sequences of one token that nobody reads."""

    input_ids: Tensor  # [R, W]
    position_ids: Tensor  # [R, W], 0 where a sequence begins
    predicting: Tensor  # [N], places in the R * W tokens whose states predict the completion tokens, in their order


def pack(rollout: Rollout, hidden_size: int, *, one_row: bool = False) -> Packed:
    """The tokens of a rollout, without its padding."""
    keep, device = rollout.attention_mask.bool(), rollout.input_ids.device
    width, starts = plan(tuple(rollout.sequence_lengths), hidden_size, one_row)
    places = torch.tensor(starts, device=device)[:, None] + rollout.position_ids
    rows = -(-(int(places[keep].max()) + 1) // width)
    ids, positions = torch.zeros((2, rows * width), dtype=torch.int64, device=device)
    ids[places[keep]] = rollout.input_ids[keep]
    positions[places[keep]] = rollout.position_ids[keep]
    return Packed(ids.view(rows, width), positions.view(rows, width), places[rollout.predicting])


@torch.no_grad()
def keeps_sequences_apart(role: Role) -> bool:
    """Whether packed sequences get the states that they get alone, asked with three short ones."""
    from srppo.rollout import collate

    vocabulary = role.causal_lm.config.get_text_config().vocab_size
    words = [[(7 * i + shift) % vocabulary for i in range(n)] for shift, n in ((0, 9), (3, 5), (11, 12))]
    rollout = collate([w[:2] for w in words], [w[2:] for w in words], pad_token_id=0, stop_token_ids=[]).to(role.device)
    with role.active():
        packed = role.packed_states(rollout, one_row=True).float()
        alone = torch.cat([role.padded_states(rollout.select([row])) for row in range(3)]).float()
    tolerance = 1e-3 if role.head.weight.dtype == torch.float32 else 5e-2  # rounding of 16-bit states
    return bool((packed - alone).norm() <= tolerance * alone.norm())


def fill_padded(prompts: Sequence[int], completions: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices in micro-batches of at most ``capacity``, padding included: neighbours in the order of their length.

    A sequence that is longer goes alone.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda i: -(prompts[i] + completions[i])):
        grown = [*batches[-1], index] if batches else [index]
        if batches and len(grown) * (max(prompts[i] for i in grown) + max(completions[i] for i in grown)) <= capacity:
            batches[-1] = grown
        else:
            batches.append([index])
    return batches


# -- of a rollout -----------------------------------------------------------------------------------------------------


def split_rows(
    rows: Tensor, rollout: Rollout, args: SRPPOConfig, *, role: Role, generator: torch.Generator | None = None
) -> list[list[Tensor]]:
    """A random partition of rows of a rollout into mini-batches of micro-batches.

    Args:
        rows: indices into the rollout: all of it, or the part that this process trains on.
        role: one that will see them, for how it takes them: packed or padded, in step with other ranks or not.
    """
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    return [split_micro_batches(mini, rollout, args, role) for mini in shuffled.split(args.mini_batch_size)]


def split_micro_batches(rows: Tensor, rollout: Rollout, args: SRPPOConfig, role: Role) -> list[Tensor]:
    """Rows in groups for one forward: as many tokens as ``max_tokens_per_micro_batch`` allows, where that is set.

    Of a sharded role all ranks have equally many rows and get equally many groups, as each forward is a collective.
    """
    limit = args.max_tokens_per_micro_batch
    if limit is None:
        return list(rows.split(args.per_device_train_batch_size))
    lengths = rollout.attention_mask[rows].sum(-1)
    if role.packs:
        groups = fill(lengths.tolist(), limit)
    else:
        completions = rollout.lengths[rows]
        groups = fill_padded((lengths - completions).tolist(), completions.tolist(), limit)
    if sharding.is_sharded(role.causal_lm):
        wanted = distributed.largest(len(groups))[0]
        while len(groups) < wanted:
            largest = max(groups, key=len)
            groups.remove(largest)
            groups += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return [rows[group] for group in groups]
