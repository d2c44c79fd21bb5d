"""SAPO's parts: rejected answers made from chosen ones, with no preference data and no reward model.

Self-Augmented Preference Optimization (arXiv 2405.20830) [paper's code], for a chosen answer A B C of a prompt:

    1. B is a random segment of 256 tokens.
    2. The EMA model, ``ema = decay ema + (1 - decay) policy`` with decay 0.5, writes B' after the prompt and A.
    3. The pair (A B C, A B' C) goes into a first-in first-out buffer of 2000.
    4. DPO or ORPO (``srppo.losses.dpo``, ``orpo`` with weight 0.05) on pairs drawn from the buffer.

Where B' ends in a stop token before the answer's end, the rejected answer ends there, instead of going on behind a
stop token. Of ours: a pair whose B' equals B is left out, as its loss would have no gradient; a segment may lie
anywhere, where the paper's code leaves the last tokens out; and :func:`writer` samples at temperature 1 from all
tokens, where the paper's code takes 0.7, top-p 0.95 and top-k 50.

Not the SAPO of TRL, verl, AReaL and Liger: that is a policy loss, Soft Adaptive Policy Optimization (arXiv 2511.20347).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from srppo.roles import Role
    from srppo.rollout import Rollout

__all__ = ["EMA", "Pair", "PairBuffer", "collate_pairs", "random_segment", "rewrite_segments", "writer"]

# (prefixes, most new tokens of each) -> the tokens written after each prefix, cut at a stop token if one comes
Continue = Callable[[list[list[int]], list[int]], list[list[int]]]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to a prompt, as token ids; ``chosen_ids`` is the better one."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class EMA:
    """An exponential moving average of a model's trainable parameters, in fp32: ``ema = decay ema + (1 - decay)
    model``.

    Only what is trained is kept twice, so with LoRA it costs the adapter, not the model.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.5) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay={decay} must lie in [0, 1)")
        self.decay = decay
        self.values = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}
        if not self.values:
            raise ValueError("EMA: the model has no trainable parameters to average")

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After an optimizer step (or an epoch: it sets what decay means)."""
        for name, parameter in self._pairs(model):
            self.values[name].lerp_(parameter.detach().float(), 1 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the averages as its parameters; its own come back at the end, bit for bit."""
        own = {name: parameter.detach().clone() for name, parameter in self._pairs(model)}
        try:
            with torch.no_grad():
                for name, parameter in self._pairs(model):
                    parameter.copy_(self.values[name])
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._pairs(model):
                    parameter.copy_(own[name])

    def _pairs(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        found = [(name, parameter) for name, parameter in model.named_parameters() if name in self.values]
        if len(found) != len(self.values):
            raise ValueError("EMA: the model does not have the parameters that the averages are of")
        return found

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"decay": self.decay, "values": dict(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a checkpoint's averages."""
        if set(state["values"]) != set(self.values):
            raise ValueError("EMA: the checkpoint is of a model with other trainable parameters")
        self.decay = state["decay"]
        for name, value in state["values"].items():
            self.values[name].copy_(value)


def random_segment(length: int, segment: int = 256, *, generator: torch.Generator | None = None) -> tuple[int, int]:
    """``(start, stop)`` of a random segment of an answer of ``length`` tokens: all of it where it is no longer."""
    if length < 1 or segment < 1:
        raise ValueError(
            f"random_segment: an answer of {length} tokens has no segment of {segment}; both must be at least 1"
        )
    size = min(segment, length)
    start = int(torch.randint(length - size + 1, (), generator=generator))
    return start, start + size


def rewrite_segments(
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[int]],
    write: Continue,
    *,
    stop_token_ids: Sequence[int],
    segment: int = 256,
    generator: torch.Generator | None = None,
) -> list[Pair]:
    """Pairs of each chosen answer and the same with a random segment rewritten.

    Args:
        prompts, chosen: token ids; a chosen answer ends in its stop token.
        write: the model that rewrites, such as :func:`writer` of the policy inside :meth:`EMA.applied`; it gets
            prefixes and how many tokens each may get, and returns what it wrote.
        stop_token_ids: tokens that end an answer.
        segment: tokens to rewrite.
        generator: decides the segments; torch's global one if absent.

    Returns:
        The pairs, without those whose rewriting changed nothing.

    Raises:
        ValueError: prompts and answers that are not as many, an empty answer, a ``write`` that returns another number.
    """
    if len(prompts) != len(chosen):
        raise ValueError(f"rewrite_segments: got {len(prompts)} prompts and {len(chosen)} chosen answers")
    cuts = [random_segment(len(answer), segment, generator=generator) for answer in chosen]
    prefixes = [[*p, *answer[:start]] for p, answer, (start, _) in zip(prompts, chosen, cuts, strict=True)]
    written = write(prefixes, [stop - start for start, stop in cuts])
    if len(written) != len(prefixes):
        raise ValueError(f"rewrite_segments: write returned {len(written)} continuations of {len(prefixes)} prefixes")
    stops, pairs = set(stop_token_ids), []
    for prompt, answer, (start, stop), new in zip(prompts, chosen, cuts, written, strict=True):
        new = list(new)[: stop - start]
        end = next((i + 1 for i, token in enumerate(new) if token in stops), None)
        rejected = [*answer[:start], *new[:end]] if end else [*answer[:start], *new, *answer[stop:]]
        if rejected != list(answer):
            pairs.append(Pair(list(prompt), list(answer), rejected))
    return pairs


class PairBuffer:
    """The newest ``capacity`` pairs, from which batches are drawn."""

    def __init__(self, capacity: int = 2000) -> None:
        if capacity < 1:
            raise ValueError(f"PairBuffer: capacity={capacity} must be at least 1")
        self.pairs: deque[Pair] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.pairs)

    def add(self, pairs: Iterable[Pair]) -> None:
        """The oldest leave where there is no room."""
        self.pairs.extend(pairs)

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> list[Pair]:
        """``count`` different pairs, or all where there are fewer, in random order."""
        order = torch.randperm(len(self.pairs), generator=generator)[:count]
        return [self.pairs[i] for i in order.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"capacity": self.pairs.maxlen, "pairs": [asdict(pair) for pair in self.pairs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a checkpoint's pairs."""
        self.pairs = deque((Pair(**pair) for pair in state["pairs"]), maxlen=state["capacity"])


def collate_pairs(
    pairs: Sequence[Pair],
    *,
    pad_token_id: int,
    stop_token_ids: Sequence[int],
    device: torch.device | str = "cpu",
) -> Rollout:
    """A batch as pair losses take it: ``[2P, ...]``, chosen first, then rejected. See ``srppo.rollout.Rollout``."""
    from srppo.rollout import collate

    return collate(
        [p.prompt_ids for p in pairs] * 2,
        [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs],
        pad_token_id=pad_token_id,
        stop_token_ids=stop_token_ids,
        device=device,
    )


def writer(
    role: Role,
    *,
    pad_token_id: int,
    stop_token_ids: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int | None = None,
) -> Continue:
    """``write`` for :func:`rewrite_segments`: samples from a role with ``srppo.rollout.generate``."""
    from srppo.rollout import generate

    def write(prefixes: list[list[int]], limits: list[int]) -> list[list[int]]:
        rollout = generate(
            role, prefixes, max_completion_length=max(limits), pad_token_id=pad_token_id, stop_token_ids=stop_token_ids,
            temperature=temperature, top_p=top_p, batch_size=batch_size,
        )  # fmt: skip
        rows: list[tuple[Tensor, Tensor]] = list(zip(rollout.completions, rollout.completion_mask, strict=True))
        return [ids[mask].tolist()[:limit] for (ids, mask), limit in zip(rows, limits, strict=True)]

    return write
