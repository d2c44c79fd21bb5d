"""OpenRLHF: what its `--reward.remote_url` file looks like, called here as OpenRLHF calls it.

    python examples/integrations/openrlhf_reward.py

In a run, the file holds the two lines of REWARD_FILE with your models, and the command has

    --reward.remote_url my_reward.py --reward.clip_range -1000 1000
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from small import byte_tokenizer, tiny_llama

REWARD_FILE = """\
from srppo.integrations.openrlhf import self_reward_func
reward_func = self_reward_func({base!r}, {sft!r}, clip_range=(-1000, 1000))
"""


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    for seed, name in enumerate(("base", "sft")):  # two random models stand in for yours
        tiny_llama(seed=seed).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    file = folder / "my_reward.py"
    file.write_text(REWARD_FILE.format(base=str(folder / "base"), sft=str(folder / "sft")))

    spec = importlib.util.spec_from_file_location("reward_func", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prompt = "<|user|>What is 2 + 2?<|end|><|assistant|>"
    for answer in ("4<|end|>", "Let me think about that for a while.<|end|>"):
        result = module.reward_func([prompt + answer], [prompt], [None])
        per_token = result["extra_logs"]["self_reward_per_token"].item()
        print(f"{answer!r}: reward {result['rewards'].item():.2f} nats, {per_token:.3f} per token")


if __name__ == "__main__":
    main()
