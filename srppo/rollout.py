"""Rollouts: completions sampled from a model, with their masks carried along.

Layout: prompts are padded on the left to ``P`` tokens, completions on the right to ``T``. Which tokens count is decided
once, at the first stop token, and carried as a mask; nothing is ever derived from a pad token, so ``pad == eos`` is
fine.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srppo import distributed, sharding
from srppo.errors import UserError
from srppo.models import trunk_of
from srppo.packing import Layout, widest_tree
from srppo.roles import Role, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from srppo.data import Example


@dataclass(frozen=True, slots=True)
class Rollout:
    """Prompts with completions. ``B`` sequences, ``P`` prompt and ``T`` completion positions."""

    input_ids: Tensor  # [B, P + T] int64
    attention_mask: Tensor  # [B, P + T] int64, 1 on prompt and completion, 0 on padding
    completion_mask: Tensor  # [B, T] bool, true up to and including the stop token
    truncated: Tensor  # [B] bool, true where no stop token came
    prompt_length: int  # P
    sampler_logprobs: Tensor | None = None  # [B, T] fp32, of what sampled, 0 where masked; if it gave them
    # what srppo.packing has found of its tokens; another rollout made of this one begins without
    laid_out: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def completions(self) -> Tensor:
        """Completion tokens, ``[B, T]``; what the mask leaves out is filler."""
        return self.input_ids[:, self.prompt_length :]

    @property
    def position_ids(self) -> Tensor:
        """Positions that start at 0 on the first token that is no padding, ``[B, P + T]``."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def predicting(self) -> Tensor:
        """The positions whose states predict the completion's tokens: those before them, ``[B, P + T]`` bool."""
        before = torch.zeros_like(self.attention_mask, dtype=torch.bool)
        before[:, self.prompt_length - 1 : -1] = self.completion_mask
        return before

    @property
    def tokens(self) -> Tensor:
        """The completions' tokens and nothing else, row after row, ``[N]``; the order of every ``[N]`` here."""
        return self.completions[self.completion_mask]

    def of_tokens(self, values: Tensor) -> Tensor:
        """The values ``[N]`` that ``values`` ``[B, T or more]`` holds at :attr:`tokens`."""
        return values[:, : self.completion_mask.shape[1]][self.completion_mask]

    def in_place(self, values: Tensor) -> Tensor:
        """Values ``[N, ...]`` of :attr:`tokens` at their places, ``[B, T, ...]``, and 0 elsewhere; differentiable."""
        empty = values.new_zeros((*self.completion_mask.shape, *values.shape[1:]))
        return empty.index_put((self.completion_mask,), values)

    @property
    def sequence_lengths(self) -> list[int]:
        """Tokens of each sequence, prompt and completion."""
        lengths: list[int] = self.attention_mask.sum(-1).tolist()
        return lengths

    @property
    def lengths(self) -> Tensor:
        """Completion tokens of each sequence, ``[B]``."""
        return self.completion_mask.sum(-1)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def select(self, rows: Tensor | Sequence[int]) -> Rollout:
        """Some sequences, without the columns that are padding in all of them: results do not depend on padding."""
        rows = torch.as_tensor(rows, device=self.input_ids.device)
        mask = self.attention_mask[rows]
        used = mask.any(0).nonzero().flatten()
        first = min(int(used[0]), self.prompt_length - 1) if len(used) else 0
        last = max(int(used[-1]) + 1, self.prompt_length + 1) if len(used) else mask.shape[1]
        return Rollout(
            self.input_ids[rows, first:last],
            mask[:, first:last],
            self.completion_mask[rows, : last - self.prompt_length],
            self.truncated[rows],
            self.prompt_length - first,
            None if self.sampler_logprobs is None else self.sampler_logprobs[rows, : last - self.prompt_length],
        )

    def with_sampler_logprobs(self, logprobs: Tensor) -> Rollout:
        return dataclasses.replace(self, sampler_logprobs=logprobs)

    def to(self, device: torch.device) -> Rollout:
        moved = {
            field.name: getattr(self, field.name).to(device)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def collate(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    stop_token_ids: Sequence[int],
    device: torch.device | str = "cpu",
) -> Rollout:
    """Given completions as a rollout: pads, and marks as truncated those that do not end in a stop token."""
    if len(prompts) != len(completions):
        raise UserError(f"there are {len(prompts)} prompts and {len(completions)} completions: each prompt needs one")
    prompt_length = max(map(len, prompts), default=1)
    completion_length = max([1, *map(len, completions)])
    shape = (len(prompts), prompt_length + completion_length)
    ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, end = prompt_length - len(prompt), prompt_length + len(completion)
        ids[row, start:end] = torch.tensor([*prompt, *completion])
        mask[row, start:end] = 1
    truncated = torch.tensor([not c or c[-1] not in stop_token_ids for c in completions], dtype=torch.bool)
    return Rollout(ids, mask, mask[:, prompt_length:].bool(), truncated, prompt_length).to(torch.device(device))


def gather(rollout: Rollout) -> Rollout:
    """The rollouts of all ranks as one, in the order of the ranks; alone, the rollout as it is."""
    if distributed.size() == 1:
        return rollout
    prompt, completion = distributed.largest(rollout.prompt_length, rollout.completions.shape[1])
    left, right = prompt - rollout.prompt_length, completion - rollout.completions.shape[1]
    pad = torch.nn.functional.pad
    sampler = rollout.sampler_logprobs
    return Rollout(
        distributed.gathered_rows(pad(rollout.input_ids, (left, right))),
        distributed.gathered_rows(pad(rollout.attention_mask, (left, right))),
        distributed.gathered_rows(pad(rollout.completion_mask, (0, right))),
        distributed.gathered_rows(rollout.truncated),
        prompt,
        None if sampler is None else distributed.gathered_rows(pad(sampler, (0, right))),
    )


def collate_demonstrations(examples: Sequence[Example], **options: Any) -> Rollout:
    """Demonstrations as a rollout; see :func:`collate`."""
    completions = [example.completion_ids for example in examples]
    assert all(c is not None for c in completions), "prompts without a completion are no demonstrations"
    return collate([e.prompt_ids for e in examples], [c for c in completions if c is not None], **options)


@torch.no_grad()
def generate(
    role: Role,
    prompts: Sequence[Sequence[int]],
    *,
    max_completion_length: int,
    pad_token_id: int,
    stop_token_ids: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int | None = None,
    extrapolate: tuple[Role, float] | None = None,
    sampler_logprobs: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Rollout:
    """Samples one completion per prompt with transformers' ``generate``.

    Sampling is from ``softmax(logits / temperature)`` and nothing else: what a checkpoint's generation_config would add
    (top-k, repetition penalty, ...) is left out, because PPO's ratio would then be about another policy. torch's global
    generator decides the samples.

    Args:
        role: the model that writes; for ``extrapolate`` the SFT model.
        prompts: token ids.
        temperature: 0 takes the most likely token.
        batch_size: prompts at a time; all at once if absent.
        extrapolate: ``(base, beta)`` samples from ``(1 + 1/beta) log pi_role - 1/beta log pi_base`` instead.
        sampler_logprobs: keep the log-probs of what was sampled from, behind temperature and top-p.
        on_batch: called with the number of sequences done, for progress bars.

    Returns:
        The completions, in the order of the prompts; a sequence is truncated where no stop token came in time.

    What all prompts of a batch begin with is computed once, in a role whose layout is :attr:`Layout.SHARED`.
    """
    from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    # Temperature and top-p are processors of our own: generate's would come behind what notes the log-probs.
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0} if temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=max_completion_length,
        pad_token_id=pad_token_id,
        eos_token_id=list(stop_token_ids),
        use_cache=True,
        **sampling,
    )
    longest = max(map(len, prompts))
    shareable = role.layout == Layout.SHARED and longest + max_completion_length <= widest_tree(role.causal_lm.config)
    completions: list[list[int]] = []
    sampled = SampledLogprobs()
    stops = torch.tensor(list(stop_token_ids))
    with role.active() as model, sharding.whole(model), contiguous_rows_into_head(model), evaluating(model):
        own_config = model.generation_config
        model.generation_config = GenerationConfig()  # what is unset above must not come from the checkpoint
        try:
            for start in range(0, len(prompts), batch_size or len(prompts)):
                chunk = prompts[start : start + (batch_size or len(prompts))]
                shared = worth_sharing(chunk) if shareable else 0
                width = max(map(len, chunk))
                ids, mask = padded_behind(chunk, shared, width, pad_token_id)
                processors = LogitsProcessorList()
                if extrapolate is not None:
                    processors.append(ExtrapolatedLogits(*extrapolate, mask.to(role.device)))
                if temperature > 0 and temperature != 1:
                    processors.append(TemperatureLogitsWarper(float(temperature)))
                if temperature > 0 and top_p < 1:
                    processors.append(TopPLogitsWarper(float(top_p)))
                if sampler_logprobs:
                    processors.append(sampled)
                output = model.generate(
                    input_ids=ids.to(role.device),
                    attention_mask=mask.to(role.device),
                    generation_config=config,
                    logits_processor=processors,
                    **cache_of(model, chunk[0][:shared], len(chunk)),
                )
                completions += [until_stop(row, stops) for row in output[:, width:].cpu()]
                if sampler_logprobs:
                    sampled.end_batch(output[:, -1], list(map(len, completions[-len(chunk) :])))
                if on_batch is not None:
                    on_batch(len(chunk))
        finally:
            model.generation_config = own_config
    rollout = collate(
        prompts, completions, pad_token_id=pad_token_id, stop_token_ids=stop_token_ids, device=role.device
    )
    return rollout.with_sampler_logprobs(rollout.in_place(torch.cat(sampled.rows))) if sampler_logprobs else rollout


def worth_sharing(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, all but a token of the shortest at most; 0 where a forward of their own would
    not pay.

    Measured on SmolLM2-135M, two threads of a CPU, prompts of 61 tokens that share 24: the first token of 24 answers
    takes 1.9 s for 3.0 s, of 6 answers 0.72 for 0.85, of 4 answers 0.50 for 0.52, of 2 answers 0.31 for 0.29.
    """
    ordered = sorted(map(list, prompts))
    first, last = ordered[0], ordered[-1]  # what these two share, all do
    most = min(map(len, prompts)) - 1
    shared = next((i for i in range(most) if first[i] != last[i]), most)
    return shared if shared * (len(prompts) - 1) >= 64 else 0


def padded_behind(
    prompts: Sequence[Sequence[int]], shared: int, width: int, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Prompts ``[B, width]`` and their mask, padded between the first ``shared`` tokens and the others."""
    ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        for part, start in ((prompt[:shared], 0), (prompt[shared:], width - len(prompt) + shared)):
            ids[row, start : start + len(part)] = torch.tensor(part, dtype=torch.int64)
            mask[row, start : start + len(part)] = 1
    return ids, mask


def cache_of(model: PreTrainedModel, tokens: Sequence[int], rows: int) -> dict[str, Any]:
    """What makes ``generate`` start behind ``tokens``: their keys and values, computed once, for each of ``rows``."""
    if not tokens:
        return {}
    name = cache_name(model)
    cache = trunk_of(model)(input_ids=torch.tensor([tokens], device=model.device), use_cache=True)[name]
    cache.batch_repeat_interleave(rows)
    return {name: cache}


@contextmanager
def contiguous_rows_into_head(model: PreTrainedModel) -> Iterator[None]:
    """The head gets contiguous rows while this holds.

    ``generate`` passes it the last position of each prompt, a strided view. For a frozen weight torch's ``linear`` then
    takes a batched product, and on a CPU that copies the weight once for each sequence: 2.1 GiB for 8 prompts and
    Qwen2.5-0.5B's head in bf16, where all of the model is 0.9.
    """
    head = model.get_output_embeddings()
    assert head is not None
    hook = head.register_forward_pre_hook(lambda _, rows: tuple(row.contiguous() for row in rows))
    try:
        yield
    finally:
        hook.remove()


def until_stop(tokens: Tensor, stops: Tensor) -> list[int]:
    """The tokens up to and including the first stop token; what follows is the filler of a batch."""
    found = torch.isin(tokens, stops).nonzero()
    return tokens[: int(found[0]) + 1].tolist() if len(found) else tokens.tolist()


def cache_name(model: PreTrainedModel) -> str:
    """What a model's forward calls its key-value cache: ``past_key_values`` in older transformers, ``cache`` since."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


class SampledLogprobs:
    """A logits processor behind all others, which changes nothing and notes the log-probs of the tokens taken.

    Measured on two threads for 24 prompts and a model of SmolLM2-135M's size: at most 3 % of sampling.
    """

    def __init__(self) -> None:
        self.rows: list[Tensor] = []  # of each completion so far, [length] fp32
        self.scores: Tensor | None = None  # of the step before, [B, V]: its tokens come with the next
        self.steps: list[Tensor] = []  # [B] each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.note(input_ids[:, -1])
        self.scores = scores
        return scores

    def note(self, tokens: Tensor) -> None:
        if self.scores is not None:
            self.steps.append(self.scores.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0])

    def end_batch(self, last: Tensor, lengths: Sequence[int]) -> None:
        """``last``: the tokens that the last step took; ``lengths``: of the completions without their filler."""
        self.note(last)
        self.rows += [row[:n] for row, n in zip(torch.stack(self.steps, dim=1), lengths, strict=True)]
        self.scores, self.steps = None, []


class ExtrapolatedLogits:
    """A logits processor that adds ``1/beta (log pi_sft - log pi_base)`` to the SFT model's log-probs.

    This is the policy that PPO with a KL penalty of weight beta towards SFT would reach if each token could be chosen
    on its own: a baseline that needs no training. The base model runs beside the SFT model with a cache of its own.
    """

    def __init__(self, base: Role, beta: float, prompt_mask: Tensor) -> None:
        if not beta > 0:
            raise UserError(f"extrapolation needs beta above 0, got {beta}")
        self.base, self.beta, self.mask, self.cache = base, beta, prompt_mask, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids if self.cache is None else input_ids[:, -1:]
        grown = input_ids.shape[1] - self.mask.shape[1]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), grown)], dim=1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        with self.base.active() as model:
            output = model(
                input_ids=new,
                attention_mask=self.mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{cache_name(model): self.cache},
            )
        self.cache = output[cache_name(model)]
        sft, base = scores.float().log_softmax(-1), output.logits[:, -1].float().log_softmax(-1)
        return sft + (sft - base) / self.beta
