"""The reward log pi_sft - log pi_base: placed, normalised and with its KL penalty."""

from srppo_kernels.log_ratio.op import RewardParts, log_ratio_reward

__all__ = ["RewardParts", "log_ratio_reward"]
