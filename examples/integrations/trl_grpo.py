"""TRL: an SFT adapter by SFTTrainer, then GRPO (or RLOO) on the self-reward, over one model in memory.

    python examples/integrations/trl_grpo.py [--algorithm rloo]

The base is a small random model, first trained a little on words and themselves in either order, so that it is no
blank page. Demonstrations say a word backwards; SFT learns that with LoRA; then the policy, a copy of the SFT adapter,
samples for words without a demonstration and is rewarded with log pi_sft - log pi_base.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from small import byte_tokenizer, tiny_llama
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from srppo.integrations.trl import use_exact_prompts, use_fused_cross_entropy, use_fused_logprobs
from srppo.self_reward import SelfReward

WORDS = ["".join(letters) for letters in itertools.product("abc", repeat=4)]
TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
QUIET = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}


def sft(folder: Path, model: PreTrainedModel, rows: list[dict[str, str]], steps: int, *, lora: bool) -> SFTTrainer:
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    args = SFTConfig(
        str(folder), per_device_train_batch_size=16, max_steps=steps, learning_rate=3e-3, logging_steps=1000, **QUIET
    )
    trainer = SFTTrainer(
        model, args=args, train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer(), peft_config=config
    )
    use_fused_cross_entropy(trainer)  # no logits
    trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithm", choices=TRAINERS, default="grpo")
    parser.add_argument("--steps", type=int, default=40, help="of GRPO or RLOO")
    parser.add_argument("--sft_steps", type=int, default=100, help="of each of the two stages before")
    arguments = parser.parse_args()
    folder, tokenizer = Path(tempfile.mkdtemp()), byte_tokenizer()

    either = [{"prompt": f"{w}:", "completion": v} for w in WORDS for v in (w, w[::-1])]
    backwards = [{"prompt": f"{w}:", "completion": w[::-1]} for w in WORDS[::4]]
    base = sft(folder / "base", tiny_llama(), either, arguments.sft_steps, lora=False).model
    base.save_pretrained(folder / "base")
    adapted = sft(folder / "sft", base, backwards, arguments.sft_steps // 2, lora=True)
    adapted.save_model(str(folder / "sft"))

    # One base in memory, with two adapters: "sft" is frozen and gives the reward, "default" is the policy.
    base = type(base).from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "sft", adapter_name="default", is_trainable=True)
    model.load_adapter(str(folder / "sft"), adapter_name="sft")
    trainer_class, config = TRAINERS[arguments.algorithm]
    args = config(
        str(folder / "run"), per_device_train_batch_size=32, num_generations=8, max_completion_length=8, beta=0.5,
        max_steps=arguments.steps, learning_rate=1e-3, logging_steps=max(1, arguments.steps // 5), **QUIET,
    )  # fmt: skip
    trainer = trainer_class(
        model, args=args, reward_funcs=SelfReward.from_peft(model, "sft", tokenizer), processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": f"{w}:"} for w in WORDS]),
    )  # fmt: skip
    use_fused_logprobs(trainer)  # log-probs without logits
    use_exact_prompts(trainer)  # the reward scores the token ids that were sampled from
    trainer.train()
    for entry in trainer.state.log_history:
        if "reward" in entry:
            print(f"step {entry['step']:3d}: self-reward {entry['reward']:.2f}, KL {entry['kl']:.3f}")
    text = "abca:"
    ids = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        out = trainer.model.generate(**ids, do_sample=False, max_new_tokens=8)
    print(f"{text} {tokenizer.decode(out[0, ids['input_ids'].shape[1] :])}")


if __name__ == "__main__":
    main()
