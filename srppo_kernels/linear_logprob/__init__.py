"""Log-probabilities of targets under ``softmax(hidden @ weight.T)`` without the logits: see :mod:`.op` for the maths."""

from srppo_kernels.linear_logprob.loss import linear_loss, linear_ppo_loss
from srppo_kernels.linear_logprob.op import LinearLogprob, explain, linear_log_ratio, linear_logprob

__all__ = ["LinearLogprob", "explain", "linear_log_ratio", "linear_logprob", "linear_loss", "linear_ppo_loss"]
