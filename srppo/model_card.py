"""The README that goes with a tuned model: what it was made from, how, and what was measured."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from srppo import distributed
from srppo.config import SRPPOConfig
from srppo.models import is_peft
from srppo.roles import Roles

SHOWN = ("objective/scores", "objective/scores_per_token", "objective/kl", "completions/mean_length")


def model_card(args: SRPPOConfig, roles: Roles, history: Sequence[Mapping[str, Any]], *, sft: str) -> str:
    """Markdown with the front matter that model hubs read; ``sft`` names the SFT model."""
    base = made_on = roles.base.source
    kind = "a fully fine-tuned model"
    if is_peft(roles.policy.model):  # its rank is that of SFT's adapter or of peft_config, where there was one
        config: Any = roles.policy.model.peft_config
        kind = f"a LoRA adapter of rank {config[roles.policy.adapter].r}"
        made_on = roles.policy.source  # a full SFT model is what the adapter must be loaded onto
    front = [
        "---",
        "library_name: " + ("peft" if is_peft(roles.policy.model) else "transformers"),
        f"base_model: {as_yaml(made_on)}",
    ]
    front += ["tags: [srppo, ppo, self-reward]", "---", ""]
    prompts = getattr(args, "prompt_dataset_name", None)  # a setting of the command, not of the trainer
    steps = [entry for entry in history if "objective/scores" in entry]
    lines = [
        "# Tuned with Self-Rewarding PPO",
        "",
        f"This is {kind}, tuned from an SFT model with PPO. The reward of a completion is its log-probability under "
        f"the SFT "
        "model minus that under the pretrained base, so no preference data and no reward model were used "
        "(arXiv 2510.21090).",
        "",
        f"- base model: `{base}`",
        f"- SFT model: `{sft}`",
        f"- data: `{args.dataset_name or 'given from Python'}`" + (f", prompts: `{prompts}`" if prompts else ""),
        f"- KL penalty: beta {args.kl_coef}{adapted(args, steps)} towards {args.kl_reference}",
        f"- {len(steps)} iterations of {args.batch_size * distributed.size()} prompts",
        "",
    ]
    if args.dataset_name and args.base_model_name_or_path:
        lines += ["The same run again:", "", "```sh"]
        settings = shlex.quote(f"{args.output_dir}/srppo_config.yaml")
        afresh = " --resume_from_checkpoint false" if args.resume_from_checkpoint else ""
        afresh += " --save_rollouts none" if getattr(args, "save_rollouts", None) else ""  # their folder is not empty
        lines += [f"srppo train --config {settings} --output_dir another-folder{afresh}", "```", ""]
    if steps:
        lines += ["| metric | first iteration | last iteration |", "|---|---|---|"]
        # what was not a number has no entry, as the KL of a policy that has become NaN
        told = [{name: f"{entry[name]:.3f}" for name in SHOWN if name in entry} for entry in (steps[0], steps[-1])]
        lines += [f"| `{name}` | " + " | ".join(entry.get(name, "-") for entry in told) + " |" for name in SHOWN]
        lines.append("")
        lines.append(
            "The reward rises in collapsed runs too: judge the model by its samples and by held-out demonstrations."
        )
        lines.append("")
    evaluations = [entry for entry in history if any(name.startswith("eval/") for name in entry)]
    if evaluations:
        lines += ["| evaluation | value |", "|---|---|"]
        lines += [f"| `{name}` | {value:.4f} |" for name, value in evaluations[-1].items() if name.startswith("eval/")]
        lines.append("")
    defaults = type(args)()
    changed = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
    changed = {name: value for name, value in changed.items() if value != getattr(defaults, name)}
    lines += ["Settings that differ from the defaults:", "", "```yaml"]
    lines += [f"{name}: {as_yaml(value)}" for name, value in changed.items()]
    lines += ["```", ""]
    return "\n".join(front + lines)


def as_yaml(value: Any) -> str:
    """A value in one line, as JSON, which YAML reads too: the bare text of a path may hold ``: `` or `` #``."""
    return json.dumps(value, ensure_ascii=False)


def adapted(args: SRPPOConfig, steps: Sequence[Mapping[str, Any]]) -> str:
    """What became of beta where a KL target adapts it."""
    if args.kl_target is None or not steps:
        return ""
    return f", adapted to hold {args.kl_target} nats a sequence and {steps[-1]['objective/kl_coef']:.3g} at the end,"
