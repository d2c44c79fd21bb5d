"""Kernels for RL fine-tuning from demonstrations: log-probs without logits, the self-reward, GAE and the PPO loss.

Every function here is a ``torch.library`` custom op in namespace ``srppo`` or a front over one, but for
``linear_loss``, which calls Python in between and is an ``autograd.Function`` (the op where it is compiled). A
plain-torch ``reference.py`` beside each documents the maths and serves as the tests' oracle. A room per op::

    linear_logprob/   log softmax(hidden @ weight.T)[target], entropy and lse, and losses over them, without the logits
    log_ratio/        the reward log pi_sft - log pi_base, placed, normalised and with its KL penalty
    gae/              generalized advantage estimation and masked whitening
    ppo_loss/         the clipped policy and value losses with all statistics

Importing this package imports neither transformers nor triton; a backend that is not available is skipped, and
``srppo env`` says why.
"""

from srppo_kernels.gae import gae, whiten
from srppo_kernels.linear_logprob import (
    LinearLogprob,
    empty_cache,
    explain,
    linear_log_ratio,
    linear_logprob,
    linear_loss,
    linear_ppo_loss,
)
from srppo_kernels.log_ratio import log_ratio_reward
from srppo_kernels.ppo_loss import PPOStats, ValueStats, ppo_loss, value_loss

__all__ = [
    "LinearLogprob",
    "PPOStats",
    "ValueStats",
    "empty_cache",
    "explain",
    "gae",
    "linear_log_ratio",
    "linear_logprob",
    "linear_loss",
    "linear_ppo_loss",
    "log_ratio_reward",
    "ppo_loss",
    "value_loss",
    "whiten",
]
