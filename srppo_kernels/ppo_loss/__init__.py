"""The clipped PPO policy and value losses, with their gradient and every statistic from one pass."""

from srppo_kernels.ppo_loss.op import PPOTerms, ppo_loss, ppo_terms, value_loss
from srppo_kernels.ppo_loss.stats import PPOStats, ValueStats

__all__ = ["PPOStats", "PPOTerms", "ValueStats", "ppo_loss", "ppo_terms", "value_loss"]
