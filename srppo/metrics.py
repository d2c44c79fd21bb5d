"""The metrics of a run: what each means, how it is computed, and where it goes.

Every metric has its denominator in :data:`METRICS`, those of evaluations in ``srppo.evaluation.EVAL_METRICS``. "Tokens"
are completion tokens up to and including the stop token; padding is in none of them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import torch

from srppo.checkpoint import write_text
from srppo.ppo import Advantages, Scores, UpdateResult
from srppo.rollout import Rollout
from srppo.trackers import Tracker, start_trackers

if TYPE_CHECKING:
    from srppo.config import SRPPOConfig

METRICS = {
    "objective/kl": "sum over tokens of log pi - log pi_ref, mean over sequences (the k1 estimate of KL, in nats)",
    "objective/kl_coef": "beta, the weight of the KL penalty, in this iteration",
    "objective/entropy": "sum over tokens of -log pi of the token taken, mean over sequences",
    "objective/scores": "self-reward, sum over tokens of log pi_sft - log pi_base, mean over sequences",
    "objective/scores_per_token": "self-reward summed over all tokens of the batch, divided by their number",
    "objective/non_score_reward": "KL penalty summed over tokens, mean over sequences",
    "objective/rlhf_reward": "shaped score plus KL penalty, mean over sequences: what PPO maximises",
    "objective/logp_sft": "log pi_sft of the tokens taken, mean over tokens",
    "objective/logp_base": "log pi_base of the tokens taken, mean over tokens",
    "policy/approxkl_avg": "k3 estimate of KL(old || new), mean over tokens and updates",
    "policy/clipfrac_avg": "part of the tokens whose clipped term was the smaller one, over all updates",
    "policy/entropy_avg": "entropy of the policy's distribution, mean over tokens and updates",
    "loss/policy_avg": "clipped loss less the entropy bonus, per token, mean over optimizer steps",
    "loss/value_avg": "value loss per token, mean over optimizer steps",
    "val/clipfrac_avg": "part of the tokens whose clipped value loss was the larger one, over all updates",
    "val/ratio": "pi / pi_old, mean over tokens and updates",
    "val/ratio_var": "variance of pi / pi_old over tokens and updates",
    "val/explained_variance": "1 - var(return - value) / var(return) over the tokens of the batch, values before the "
    "update",
    "val/num_eos_tokens": "completions that ended in a stop token, count",
    "completions/mean_length": "tokens, mean over sequences",
    "completions/min_length": "tokens, smallest",
    "completions/max_length": "tokens, largest",
    "completions/clipped_ratio": "part of the sequences that were cut at max_completion_length",
    "grad_norm": "norm of the policy's gradient before clipping, mean over optimizer steps",
    "value_grad_norm": "norm of the critic's gradient before clipping, mean over optimizer steps",
    "skipped_steps": "optimizer steps dropped because a gradient was not finite, count",
    "ppo_epochs": "epochs done before target_kl ended them, count",
    "guard/demonstrations_logp": "log pi of held-out demonstrations under the policy that sampled, mean over their "
    "tokens (at most as many demonstrations as an iteration has prompts)",
    "sampling/logp_difference/mean": "|log pi_old - log mu|, mu being what sampled, mean over tokens",
    "sampling/logp_difference/max": "the same, largest",
    "lr": "learning rate of the policy in this iteration",
    "episode": "completions sampled so far",
    "num_tokens": "completion tokens sampled so far",
    "step_time": "seconds for the iteration",
    "time/rollout": "seconds for sampling",
    "time/score": "seconds for scoring under all roles, advantages and the guard's look",
    "time/update": "seconds for the updates",
    "perf/tokens_per_second": "completion tokens of the iteration divided by its seconds",
    "perf/peak_memory_gib": "largest memory so far: of the GPU, or on a CPU of the process",
}


def iteration_metrics(rollout: Rollout, scores: Scores, targets: Advantages, result: UpdateResult) -> dict[str, float]:
    """The metrics of one iteration that come from its tensors."""
    lengths, tokens = rollout.lengths.float(), rollout.completion_mask.sum().clamp(min=1)
    policy, value = result.policy, result.value
    residual = (targets.returns - scores.values)[rollout.completion_mask]
    returns = targets.returns[rollout.completion_mask]
    variance = returns.var(correction=0)
    penalties = targets.penalties.sum(-1)
    metrics = {
        "objective/kl": (scores.policy - scores.reference).sum(-1).mean(),
        "objective/entropy": -scores.policy.sum(-1).mean(),
        "objective/scores": targets.scores.mean(),
        "objective/scores_per_token": targets.scores.sum() / tokens,
        "objective/non_score_reward": penalties.mean(),
        "objective/rlhf_reward": (targets.shaped_scores + penalties).mean(),
        "objective/logp_sft": scores.sft.sum() / tokens,
        "objective/logp_base": scores.base.sum() / tokens,
        "policy/approxkl_avg": policy.approx_kl,
        "policy/clipfrac_avg": policy.clipfrac_low + policy.clipfrac_high,
        "policy/entropy_avg": math.nan if policy.entropy is None else policy.entropy,
        "loss/policy_avg": result.policy_loss,
        "loss/value_avg": result.value_loss,
        "val/clipfrac_avg": value.clipfrac,
        "val/ratio": policy.ratio_mean,
        "val/ratio_var": policy.ratio_var,
        "val/explained_variance": 1 - residual.var(correction=0) / variance if variance > 0 else math.nan,
        "val/num_eos_tokens": (~rollout.truncated).sum(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": rollout.truncated.float().mean(),
        "grad_norm": result.grad_norm,
        "value_grad_norm": result.value_grad_norm,
        "skipped_steps": result.skipped_steps,
        "ppo_epochs": result.epochs,
    }
    return {name: float(number) for name, number in metrics.items()}


def peak_memory_gib() -> float:
    """Largest memory so far: allocated on the GPU if there is one, else resident in the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss also counts the process that started this one
        peak = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if peak is not None:
            return int(peak.split()[1]) / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # not there on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there and in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsWriter:
    """Writes metrics to ``metrics.jsonl`` and to the trackers that are asked for; keeps the history for the plots.

    The configuration and all files are written with the first entry: a run that is refused at its start leaves nothing.
    One that is resumed has entries already.
    Without a folder, as on every rank but the first, it keeps the history alone.

    Args:
        place: where ``folder`` will be in the end, if it has another name until then.
    """

    def __init__(
        self,
        folder: Path | None,
        args: SRPPOConfig,
        history: Sequence[Mapping[str, Any]] = (),
        *,
        place: Path | None = None,
    ) -> None:
        self.folder, self.args, self.place = folder, args, place or folder
        self.history: list[dict[str, Any]] = [dict(entry) for entry in history]
        self.file: IO[str] | None = None
        self.trackers: list[Tracker] = []

    def open(self, folder: Path) -> IO[str]:
        write_text(folder / "srppo_config.yaml", self.args.to_yaml())
        step = self.history[-1]["step"] if self.history else 0
        self.trackers = start_trackers(folder, self.args, step, self.place or folder)
        return self.rewrite(folder)

    def rewrite(self, folder: Path) -> IO[str]:
        path = folder / "metrics.jsonl"
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in self.history))
        return path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One entry, or more of the last one where the step is the same; metrics that are not a number here (no
        variance yet, say) are left out."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        again = bool(self.history) and self.history[-1]["step"] == step
        if self.folder is not None and self.file is None:
            self.file = self.open(self.folder)
        if again:
            self.history[-1] |= finite
        else:
            self.history.append({"step": step, **finite})
        if self.folder is None or self.file is None:
            return
        if again:
            self.file.close()
            self.file = self.rewrite(self.folder)
        else:
            self.file.write(json.dumps(self.history[-1]) + "\n")
            self.file.flush()
        for tracker in self.trackers:
            tracker.log(step, finite)

    def __enter__(self) -> MetricsWriter:
        if self.folder is not None and self.history:
            self.file = self.open(self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None:
            self.file.close()
        for tracker in self.trackers:
            tracker.close()
