"""verl: a registered policy loss against verl's own, and the configuration that uses it and the self-reward.

pip install verl                                    # with its requirements
python examples/integrations/verl_losses.py
"""

from __future__ import annotations

import torch

CONFIGURATION = """\
actor_rollout_ref.model.external_lib=srppo.integrations.verl
actor_rollout_ref.actor.policy_loss.loss_mode=srppo_ppo
reward.reward_manager.source=importlib
reward.reward_manager.name=SelfRewardManager
reward.reward_manager.module.path=pkg://srppo.integrations.verl
+reward.reward_kwargs.base=my-base
+reward.reward_kwargs.sft=my-sft"""


def main() -> None:
    try:
        from verl.trainer.ppo.core_algos import get_policy_loss_fn
        from verl.workers.config import ActorConfig
    except ImportError as error:
        raise SystemExit(f"this example needs verl with its requirements: {error}") from None
    import srppo.integrations.verl  # registers the losses

    torch.manual_seed(0)
    config = ActorConfig(strategy="fsdp", use_dynamic_bsz=True, rollout_n=1)
    old = -3 * torch.rand(4, 16)
    inputs = {
        "old_log_prob": old,
        "log_prob": old + 0.3 * torch.randn_like(old),
        "advantages": torch.randn_like(old),
        "response_mask": (torch.arange(16) < torch.tensor([16, 9, 4, 1])[:, None]).long(),
    }
    for name in ("vanilla", "srppo_ppo"):
        loss, metrics = get_policy_loss_fn(name)(**inputs, config=config)
        print(f"{name:10s} {loss.item():.6f}", {key: round(value, 4) for key, value in metrics.items()})
    print("registered:", ", ".join(srppo.integrations.verl.LOSSES))
    print(f"\nfor a run of verl:\n{CONFIGURATION}")


if __name__ == "__main__":
    main()
