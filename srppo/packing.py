"""Sequences laid end to end, so that a forward computes tokens and no padding; and micro-batches bounded by tokens.

``B`` sequences of lengths ``n_b``, padded, cost a forward ``B (max prompt + max completion)`` tokens. Laid end to end
in rows they cost ``sum_b n_b`` and what stays free at the ends of the rows. Position ids that restart at 0, with no
attention mask, tell transformers where a sequence begins, and attention stays inside it: the states are those of each
sequence alone, up to rounding. A model that reads position ids otherwise would mix sequences in silence, so every model
is asked first (:func:`keeps_sequences_apart`), and one that fails is given padded micro-batches.

How wide is a row? Eager and sdpa attention compute the pairs that the mask hides, so a row of width ``W`` costs a layer
of hidden size ``D`` about ``24 D^2 W`` operations in its matrices (of ``12 D^2`` weights) and ``4 D W^2`` in attention,
and ``R`` rows cost, up to a constant, ``R W (6 D + W)``: few wide rows have no gaps, many narrow ones waste no
attention. The cheapest of both is taken. flash-attn computes no hidden pair: there one row holds everything. Where a
model counts places in a row instead of positions, no row of several sequences reaches those that it tells apart.

Sequences that begin alike are laid out as a tree (:mod:`srppo.prefixes`) where that is cheaper still, the model takes a
mask that says who attends to whom, and it attends to all that came before: eager and sdpa attention do the former, and
no row is wider than a sliding window.

Measured on one thread of a CPU for a random model of SmolLM2-135M's size with LoRA, 16 prompts of 15 to 45 tokens with
completions of 4 to 48, micro-batches of 4 (process time, the better of two runs): scoring 14.0 s for 18.7 s padded, the
update 15.7 s for 20.7 s, a quarter less each; with at most 400 tokens in a micro-batch 13.2 and 17.0 s, for 16.1 and
17.9 s of padded ones sorted by length. The SmolLM2 example's prompts of 61 tokens share the first 24: as trees its
micro-batches of 8 take 0.64 of the time to score and 0.67 to update, two threads.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srppo import distributed, prefixes, sharding
from srppo.errors import UserError
from srppo.models import from_tokens_alone

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from srppo.config import SRPPOConfig
    from srppo.roles import Role
    from srppo.rollout import Rollout


class Layout(enum.IntEnum):
    """How the sequences of a micro-batch are laid out for a forward; a model that takes one takes those before it."""

    PADDED = 0
    PACKED = 1  # end to end
    SHARED = 2  # the same, with what they begin with alike computed once


def row_cost(hidden_size: int, rows: int, width: int) -> int:
    """What a forward of ``rows`` of ``width`` tokens costs, in a unit of its own; see above."""
    return rows * width * (6 * hidden_size + width)


def fill(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins of at most ``capacity``, few of them: first-fit decreasing, ties in their order.

    What is longer than ``capacity`` gets a bin of its own.
    """
    leaves = 1 << (len(lengths) - 1).bit_length()
    bins: list[list[int]] = [[] for _ in range(leaves)]
    room = [capacity] * (2 * leaves)  # a tree: bin b is node leaves + b, and node n has the largest room below it
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        wanted, node = min(lengths[index], capacity), 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < wanted)  # to the left where there is room, so to the first such bin
        bins[node - leaves].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [members for members in bins if members]


@functools.lru_cache(maxsize=4096)  # each micro-batch of a rollout goes through all roles and epochs
def plan(lengths: tuple[int, ...], hidden_size: int, one_row: bool, widest: int = 2**31) -> tuple[int, tuple[int, ...]]:
    """The width of the rows, and the place of each sequence's first token: ``row * width + offset``. What is longer
    than ``widest`` has a row of its own."""
    longest, total = max(lengths), sum(lengths)
    best: tuple[int, int, list[list[int]]] | None = None
    rows = 1
    while best is None or (not one_row and rows < 2 * len(lengths)):
        bins = fill(lengths, min(widest, max(longest, -(-total // rows))))
        width = max(sum(lengths[i] for i in members) for members in bins)
        cost = row_cost(hidden_size, len(bins), width)
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
    attends: Tensor | None = None  # [R, 1, W, W] bool, which tokens of its row a token sees; absent, see position_ids


def pack(
    rollout: Rollout, hidden_size: int, *, one_row: bool = False, widest_tree: int = 0, widest_row: int = 2**31
) -> Packed:
    """The tokens of a rollout, without its padding. How they lie is found once for a rollout and the same options, as
    each role of an iteration asks for it; a tree's mask is computed each time, on the rollout's device.

    Args:
        one_row: all of them in one row.
        widest_tree: rows of at most so many tokens may be trees, if that is cheaper.
        widest_row: a sequence beside others ends within so many tokens of its row.
    """
    options = hidden_size, one_row, widest_tree, widest_row
    if options not in rollout.laid_out:
        rollout.laid_out[options] = lay_out(rollout, *options)
    packed, forest = rollout.laid_out[options]
    return packed if forest is None else dataclasses.replace(packed, attends=forest.attends)


def lay_out(
    rollout: Rollout, hidden_size: int, one_row: bool, widest_tree: int, widest_row: int
) -> tuple[Packed, prefixes.Forest | None]:
    """What :func:`pack` gives but for the mask, and where there is one, what has it."""
    keep, device = rollout.attention_mask.bool(), rollout.input_ids.device
    lengths = tuple(rollout.sequence_lengths)
    width, starts = plan(lengths, hidden_size, one_row, widest_row)
    rows = max(starts) // width + 1
    if widest_tree:
        sequences = prefixes.in_order(rollout.input_ids, keep)
        cost, trees = prefixes.cheapest(sequences, functools.partial(row_cost, hidden_size))
        if cost < row_cost(hidden_size, rows, width) and max(tree.size for tree in trees) <= widest_tree:
            forest = prefixes.lay_out(sequences, trees).to(device)
            predicting = forest.places.gather(1, rollout.position_ids)[rollout.predicting]
            return Packed(forest.input_ids, forest.position_ids, predicting), forest
    places = torch.tensor(starts, device=device)[:, None] + rollout.position_ids
    ids, positions = torch.zeros((2, rows * width), dtype=torch.int64, device=device)
    ids[places[keep]] = rollout.input_ids[keep]
    positions[places[keep]] = rollout.position_ids[keep]
    return Packed(ids.view(rows, width), positions.view(rows, width), places[rollout.predicting]), None


def layout_of(role: Role) -> Layout:
    """The best layout that a role's model takes, asked with short sequences.

    Raises:
        UserError: as :func:`check_padding`.
    """
    alone = check_padding(role)
    if not keeps_sequences_apart(role, alone):
        return Layout.PADDED
    return Layout.SHARED if takes_trees(role) else Layout.PACKED


def check_padding(role: Role) -> tuple[Rollout, Tensor]:
    """Stops if padding changes what a role's model computes of the tokens behind it, as in one that knows no mask;
    returns what it asked with, for :func:`keeps_sequences_apart`."""
    with from_tokens_alone(role.causal_lm):
        alone = states_alone(role, APART)
        same = gets_the_states_of_each_alone(role, alone, Layout.PADDED)
    if not same:
        raise UserError(
            f"{type(role.causal_lm).__name__} gives a sequence other states where it is padded on the left, so that "
            "its log-probs would depend on the batch: this architecture is not supported yet"
        )
    return alone


def keeps_sequences_apart(role: Role, alone: tuple[Rollout, Tensor] | None = None) -> bool:
    """Whether packed sequences get the states that they get alone; ``alone`` is what :func:`check_padding` gave."""
    return gets_the_states_of_each_alone(role, alone or states_alone(role, APART), Layout.PACKED)


def takes_trees(role: Role) -> bool:
    """Whether sequences that begin alike get the states that they get alone where they are laid out as a tree."""
    if attention_of(role.causal_lm.config) not in ("eager", "sdpa") or not widest_tree(role.causal_lm.config):
        return False
    try:
        return gets_the_states_of_each_alone(role, states_alone(role, ALIKE), Layout.SHARED)
    except Exception:  # what a model says that knows no such mask is its own matter: it gets sequences end to end
        return False


# Sequences to ask a model with, each a shift and a length: those with the same shift begin alike for six tokens.
APART = [(0, 9), (3, 5), (11, 12)]
ALIKE = [(0, 9), (0, 12), (3, 5), (0, 12)]


@torch.no_grad()
def states_alone(role: Role, sequences: Sequence[tuple[int, int]]) -> tuple[Rollout, Tensor]:
    """Sequences as a rollout, and the states that each of them gets in a forward of its own, ``[N, D]``."""
    from srppo.rollout import collate

    vocabulary = role.causal_lm.config.get_text_config().vocab_size
    words = [
        [(7 * i + shift + (i > 5) * row) % vocabulary for i in range(n)] for row, (shift, n) in enumerate(sequences)
    ]
    prompts, completions = [w[: len(w) // 2] for w in words], [w[len(w) // 2 :] for w in words]
    rollout = collate(prompts, completions, pad_token_id=0, stop_token_ids=[]).to(role.device)
    with role.active():
        return rollout, torch.cat([role.padded_states(rollout.select([row])) for row in range(len(words))])


@torch.no_grad()
def gets_the_states_of_each_alone(role: Role, asked: tuple[Rollout, Tensor], layout: Layout) -> bool:
    """Whether sequences in one forward, laid out so, get what :func:`states_alone` found."""
    rollout, alone = asked
    with role.active():
        if layout == Layout.PADDED:
            together = role.padded_states(rollout)
        else:
            together = dataclasses.replace(role, layout=layout).packed_states(rollout, one_row=True)
    tolerance = 1e-3 if role.head.weight.dtype == torch.float32 else 5e-2  # rounding of 16-bit states
    if layout == Layout.PADDED:
        tolerance *= 4  # there is no other, and what rounding sends to another expert is no padding that was read
    return bool((together - alone).float().norm() <= tolerance * alone.float().norm())


def attention_of(config: PreTrainedConfig) -> str:
    return config._attn_implementation or "eager"


def narrowest(config: PreTrainedConfig, *names: str) -> int:
    """The smallest of a model's settings whose names end so."""
    settings = vars(config.get_text_config())  # and not to_dict(), which copies all of it at each forward
    return min([2**31, *(n for key, n in settings.items() if key.endswith(names) and type(n) is int)])


def widest_tree(config: PreTrainedConfig) -> int:
    """How wide a row may be that is a tree: as wide as the narrowest window or chunk that some layer attends in, since
    the mask of a tree is the same for all of them."""
    return min(narrowest(config, "window", "window_size", "chunk_size"), widest_row(config))


def widest_row(config: PreTrainedConfig) -> int:
    """How wide a row of several sequences may be, since some models count places in a row and restart with no sequence:
    the chunks and the temperature of Llama 4's attention, and the blocks of keys of which MiniMax M3 chooses some. What
    they are asked at the start is shorter."""
    return narrowest(config, "attention_chunk_size", "floor_scale", "index_block_size") - 1


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


def neighbours(rollout: Rollout, layout: Layout) -> Tensor:
    """Rows in an order in which those beside each other cost little together: alike in length, or in their tokens."""
    if layout == Layout.SHARED:
        return prefixes.in_order(rollout.input_ids, rollout.attention_mask.bool()).order
    return torch.argsort(rollout.attention_mask.sum(-1), descending=True, stable=True)


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
    if role.layout >= Layout.PACKED:
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
