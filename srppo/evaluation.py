"""What a tuned model is judged by: its own samples under the self-reward, and what the reward cannot see.

The reward rises in collapsed runs too, so every evaluation also gives the likelihood of held-out demonstrations, KL to
SFT and length; and exact match where the data has an ``answer``.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from srppo import distributed
from srppo.checkpoint import move, temporary_folder
from srppo.config import SRPPOConfig
from srppo.data import Example, filler_token
from srppo.models import Head
from srppo.ppo import logprobs, split_micro_batches
from srppo.roles import Role
from srppo.rollout import Rollout, collate_demonstrations, gather, generate
from srppo_kernels import linear_logprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVAL_METRICS = {
    "eval/objective/scores": "self-reward of sampled completions, summed over tokens, mean over sequences",
    "eval/objective/scores_per_token": "the same, summed over all tokens and divided by their number",
    "eval/objective/kl": "log pi - log pi_sft of sampled completions, summed over tokens, mean over sequences; pi is "
    "the policy that sampled, extrapolated or not",
    "eval/completions/mean_length": "tokens, mean over sampled completions",
    "eval/completions/clipped_ratio": "part of the sampled completions that were cut at max_completion_length",
    "eval/demonstrations/logp": "log pi of held-out demonstrations, mean over their tokens",
    "eval/demonstrations/logp_sft": "log pi_sft of the same",
    "eval/exact_match": "part of the sampled completions that give the row's answer, among rows that have one",
}


@contextlib.contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Sampling under its own seed, apart on every rank, which leaves the generators outside as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        distributed.seed_apart(seed)
        yield


def evaluate_policy(
    policy: Role,
    sft: Role,
    base: Role,
    examples: Sequence[Example],
    args: SRPPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_token_ids: Sequence[int],
    extrapolate: float | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Samples a completion per prompt and measures it; see :data:`EVAL_METRICS`. Ranks share the prompts; all get all
    results.

    Args:
        extrapolate: a beta; the samples then come from ``(1 + 1/beta) log pi_policy - 1/beta log pi_base``.

    Returns:
        The metrics, and a row per prompt with its completion and what it scored.
    """
    pad = filler_token(tokenizer, stop_token_ids)
    with fixed_seed(args.seed):
        rollout = generate(
            policy,
            [example.prompt_ids for example in distributed.even_share(examples)],
            max_completion_length=args.max_completion_length,
            pad_token_id=pad,
            stop_token_ids=stop_token_ids,
            temperature=args.temperature,
            top_p=args.top_p,
            batch_size=max(args.per_device_train_batch_size, 32),
            extrapolate=None if extrapolate is None else (base, extrapolate),
            on_batch=on_batch,
        )
    extrapolated = None if extrapolate is None else Extrapolated(policy, base, extrapolate)

    @functools.cache  # the policy may be the SFT model or the base, and both temperatures the same
    def logp(role: Role, given: Rollout, temperature: float) -> torch.Tensor:
        return sequence_logprobs(role, given, temperature, args)

    def policy_logp(given: Rollout, temperature: float) -> torch.Tensor:
        if extrapolated is None:
            return logp(policy, given, temperature)
        parts = (given.select(rows) for rows in torch.arange(len(given)).split(args.per_device_train_batch_size))
        return torch.cat([extrapolated.logprobs(part, temperature).sum(-1).cpu() for part in parts])

    scores = logp(sft, rollout, args.score_temperature) - logp(base, rollout, args.score_temperature)
    kl = policy_logp(rollout, args.temperature) - logp(sft, rollout, args.temperature)
    if distributed.size() > 1:
        scores, kl = (distributed.gathered_rows(x)[: len(examples)] for x in (scores, kl))
        rollout = gather(rollout).select(range(len(examples)))
    lengths = rollout.lengths.cpu()
    metrics = {
        "eval/objective/scores": scores.mean().item(),
        "eval/objective/scores_per_token": (scores.sum() / lengths.sum().clamp(min=1)).item(),
        "eval/objective/kl": kl.mean().item(),
        "eval/completions/mean_length": lengths.float().mean().item(),
        "eval/completions/clipped_ratio": rollout.truncated.float().mean().item(),
    }
    rows = completion_rows(examples, rollout, scores, kl, tokenizer, skip_special_tokens=True)
    with_answer = [
        (row, example.answer) for row, example in zip(rows, examples, strict=True) if example.answer is not None
    ]
    if with_answer:
        for judged, answer in with_answer:
            judged["exact_match"] = answers_match(judged["completion"], answer)
        metrics["eval/exact_match"] = sum(judged["exact_match"] for judged, _ in with_answer) / len(with_answer)
    demonstrations = [example for example in examples if example.completion_ids is not None]
    if demonstrations:
        demos = collate_demonstrations(
            distributed.even_share(demonstrations),
            pad_token_id=pad,
            stop_token_ids=stop_token_ids,
            device=policy.device,
        )
        of_all = lambda x: distributed.gathered_rows(x)[: len(demonstrations)].sum().item()  # noqa: E731
        tokens = of_all(demos.lengths.cpu())
        metrics["eval/demonstrations/logp"] = of_all(policy_logp(demos, 1.0)) / tokens
        metrics["eval/demonstrations/logp_sft"] = of_all(logp(sft, demos, 1.0)) / tokens
    return metrics, [{**example.key, **row} for example, row in zip(examples, rows, strict=True)]


def completion_rows(
    examples: Sequence[Example],
    rollout: Rollout,
    scores: torch.Tensor,
    kl: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    skip_special_tokens: bool,
) -> list[dict[str, Any]]:
    """A row per completion for people to read, with its score ``[B]`` and KL ``[B]``; the texts are for show only.

    Without special tokens a completion is without its stop token too, which ``stop_token_ids`` may make of any token.
    """
    tokens, masks = rollout.completions.cpu(), rollout.completion_mask.cpu()  # at once: a GPU would be asked row by row
    numbers = zip(scores.tolist(), kl.tolist(), rollout.truncated.tolist(), strict=True)
    rows = []
    for example, row, mask, (score, apart, truncated) in zip(examples, tokens, masks, numbers, strict=True):
        ids = row[mask].tolist()
        text_ids = ids[:-1] if skip_special_tokens and not truncated else ids
        rows.append({
            "prompt": tokenizer.decode(example.prompt_ids),
            "completion": tokenizer.decode(text_ids, skip_special_tokens=skip_special_tokens),
            "score": score,
            "score_per_token": score / max(len(ids), 1),
            "kl": apart,
            "length": len(ids),
            "truncated": truncated,
        })  # fmt: skip
    return rows


def write_completions(folder: Path, rows: Sequence[dict[str, Any]], *, step: int) -> None:
    """All rows of an iteration, as ``completions_<step>.parquet``."""
    import pyarrow
    import pyarrow.parquet

    with temporary_folder(folder) as writing:
        path = writing / f"completions_{step:05d}.parquet"
        with path.open("wb") as file:  # pyarrow takes the path of a folder such as run:1 for a URI, and ~ for a home
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"step": step, **row} for row in rows]), file)
        move(path, folder / path.name)


def table_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of :func:`completion_rows` with titles for the console."""
    names = {"prompt": "prompt", "completion": "completion", "score": "score", "score_per_token": "per token"}
    names |= {"kl": "KL", "length": "tokens", "truncated": "cut"}
    return [{title: row[name] for name, title in names.items()} for row in rows]


def sequence_logprobs(role: Role, rollout: Rollout, temperature: float, args: SRPPOConfig) -> torch.Tensor:
    """Log-prob of each completion, summed over its tokens, ``[B]`` on the CPU."""
    sums = torch.zeros(len(rollout))
    with role.active():  # once, and not for each micro-batch
        for rows in split_micro_batches(torch.arange(len(rollout)), rollout, args, role):
            sums[rows] = logprobs(role, rollout.select(rows), temperature=temperature)[0].sum(-1).cpu()
    return sums


class Extrapolated:
    """The policy ``(1 + 1/beta) log pi - 1/beta log pi_base``, normalised.

    The normalisers of the two cancel in the softmax, so this is one linear head over both hidden states side by side,
    and the logits are not needed; with a softcap, which is not linear, they are, a micro-batch at a time.
    """

    @torch.no_grad()
    def __init__(self, policy: Role, base: Role, beta: float) -> None:
        self.sides = (policy, policy.head, 1 + 1 / beta), (base, base.head, -1 / beta)
        self.capped = any(head.softcap is not None for _, head, _ in self.sides)
        if not self.capped:
            factors = [(head, head.logit_scale * factor) for _, head, factor in self.sides]
            biases = [head.bias.float() * factor for head, factor in factors if head.bias is not None]
            self.weight = torch.cat([head.weight.float() * factor for head, factor in factors], -1)
            self.bias = torch.stack(biases).sum(0) if biases else None

    @torch.no_grad()
    def logprobs(self, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
        """Log-probs ``[B, T]`` at a temperature, 0 where masked."""
        hiddens = []
        for role, _, _ in self.sides:
            with role.active():
                hiddens.append(role.hidden(rollout).float())
        if not self.capped:
            hidden = torch.cat(hiddens, -1)
            found = linear_logprob(hidden, self.weight, rollout.tokens, bias=self.bias, temperature=temperature)
            return rollout.in_place(found.logprob)
        sides = zip(hiddens, self.sides, strict=True)
        logits = torch.stack([factor * capped_logits(hidden, head) for hidden, (_, head, factor) in sides]).sum(0)
        logp = (logits / temperature).log_softmax(-1).gather(-1, rollout.tokens[..., None]).squeeze(-1)
        return rollout.in_place(logp)


def capped_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """The logits themselves, ``[N, V]`` fp32."""
    bias = None if head.bias is None else head.bias.float()
    logits = torch.nn.functional.linear(hidden, head.weight.float(), bias) * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def answers_match(completion: str, answer: str) -> bool:
    """Whether a completion gives the answer: numbers are compared with the completion's last number, text as a
    whole. A comma before three digits groups them, and a hyphen behind a digit is no sign."""
    number = r"(?:(?<!\d)-)?\d+(?:\.\d+)?"
    answer, completion = (re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) for text in (answer, completion))
    wanted = re.fullmatch(number, answer.strip())
    if wanted:
        found = re.findall(number, completion)
        return bool(found) and float(found[-1]) == float(wanted.group())
    return completion.strip().casefold() == answer.strip().casefold()
