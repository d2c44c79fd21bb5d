"""Self-Rewarding PPO: fused kernels and a thin trainer for RL fine-tuning from demonstrations alone.

The ops come from :mod:`srppo_kernels` and are imported at once; they need torch only. The trainer and its pieces need
transformers and are imported when first used::

    import srppo

    out = srppo.linear_logprob(hidden, lm_head.weight, targets, entropy=True)      # no logits
    trainer = srppo.SRPPOTrainer(model=sft, base_model=base, args=srppo.SRPPOConfig(...), train_dataset=prompts)
    trainer.train()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from srppo_kernels import (
    LinearLogprob,
    PPOStats,
    ValueStats,
    explain,
    gae,
    linear_log_ratio,
    linear_logprob,
    linear_loss,
    linear_ppo_loss,
    log_ratio_reward,
    ppo_loss,
    value_loss,
    whiten,
)

if TYPE_CHECKING:
    from srppo import losses, modules
    from srppo.config import PipelineConfig, SRPPOConfig
    from srppo.errors import UserError
    from srppo.self_reward import SelfReward
    from srppo.sft import run_sft
    from srppo.trainer import SRPPOTrainer

_SUBMODULES = ("data", "distributed", "engines", "evaluation", "losses", "metrics", "modules", "ppo")
_LAZY = {
    "PipelineConfig": "srppo.config",
    "SRPPOConfig": "srppo.config",
    "SRPPOTrainer": "srppo.trainer",
    "SelfReward": "srppo.self_reward",
    "UserError": "srppo.errors",
    "run_sft": "srppo.sft",
}

__all__ = [
    "LinearLogprob",
    "PPOStats",
    "PipelineConfig",
    "SRPPOConfig",
    "SRPPOTrainer",
    "SelfReward",
    "UserError",
    "ValueStats",
    "explain",
    "gae",
    "linear_log_ratio",
    "linear_logprob",
    "linear_loss",
    "linear_ppo_loss",
    "log_ratio_reward",
    "losses",
    "modules",
    "ppo_loss",
    "run_sft",
    "value_loss",
    "whiten",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"srppo.{name}")
    raise AttributeError(f"module 'srppo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_SUBMODULES})
