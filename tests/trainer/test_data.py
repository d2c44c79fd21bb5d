"""Reading and tokenising: every kind of source gives the same rows, and every mistake is named with its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from tiny_runs import QUIET, ROWS, config, examples, trainer, write_jsonl
from tokenizers.processors import TemplateProcessing

from srppo import SRPPOConfig, UserError, run_sft
from srppo.data import Example, Sampler, digest, end_with_stop, filler_token, load_rows, prepare, stop_tokens

TOKENIZER = tiny_tokenizer()
END, USER, ASSISTANT = 0, 2, 3


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def tokenised(rows, *, tokenizer=TOKENIZER, stops=(END,), longest=(64, 64)):
    return prepare(
        rows, tokenizer, stop_token_ids=stops, max_prompt_length=longest[0], max_completion_length=longest[1]
    )


def test_a_digest_tells_rows_from_others_by_all_that_is_learnt_or_judged_from_them():
    rows = [[Example([1], [2], "x", "here")], [Example([1, 2], [], "x", "here")], [Example([1], None, "x", "here")],
            [Example([1], [2], None, "here")], [Example([1], [2], "x", "here")] * 2]  # fmt: skip
    assert len({digest(examples) for examples in rows}) == len(rows)
    assert digest(rows[0]) == digest([Example([1], [2], "x", "another place")])


# -- sources ----------------------------------------------------------------------------------------------------------


def write(kind: str, folder: Path, rows) -> Path:
    """The rows as a source of one kind; the path to give as dataset_name."""
    if kind == "jsonl":
        return Path(write_jsonl(folder / "data.jsonl", rows))
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")
        return folder / "data.parquet"
    if kind == "csv":
        with (folder / "data.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return folder / "data.csv"
    if kind == "folder":
        write_jsonl(folder / "split" / "train.jsonl", rows)
        write_jsonl(folder / "split" / "test.jsonl", rows[:1])
        return folder / "split"
    if kind == "save_to_disk":
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "disk"))
        return folder / "disk"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder / "dict"))
    return folder / "dict"


SOURCE_ROWS = [
    {"prompt": "2+2=", "completion": "4", "answer": "4"},
    {"prompt": 'say "a, b"\nplease', "completion": None, "answer": None},
    {"prompt": "naïve ✓", "completion": "ünï", "answer": "x"},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "folder", "save_to_disk", "dataset_dict"])
def test_every_kind_of_source_gives_the_same_examples(tmp_path, kind):
    source = write(kind, tmp_path, SOURCE_ROWS)
    got = tokenised(load_rows(str(source), "train"))
    assert [(e.prompt_ids, e.completion_ids) for e in got] == [
        (ids(row["prompt"]), None if row["completion"] is None else [*ids(row["completion"]), END])
        for row in SOURCE_ROWS
    ]
    assert [e.answer for e in got] == ["4", None, "x"]
    assert all(str(source) in e.where for e in got)


@pytest.mark.parametrize("kind", ["save_to_disk", "dataset_dict"])
@pytest.mark.parametrize("name", ["*.arrow", "state.json", "dataset_info.json"])
def test_a_damaged_file_of_a_saved_data_set_is_an_error_that_names_the_folder(tmp_path, kind, name):
    folder = write(kind, tmp_path, SOURCE_ROWS)
    file = next(folder.rglob(name))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=f"cannot read the data set in {folder}: .+"):
        load_rows(str(folder), "train")


@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tool_calls_in_a_table_are_rendered_as_in_lines(tmp_path, kind, content):
    """A table gives each call the arguments of all tools, and the template wrote those of others as null. Beside calls
    the content is often null."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content + '' }}{{ m.tool_calls | tojson if 'tool_calls' in m }}{% endfor %}"
    )
    calls = [{"name": "add", "arguments": {"a": 1}}, {"name": "show", "arguments": {"b": 2}}]
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", **content, "tool_calls": calls}]
    rows = [{"messages": [*turns, {"role": "user", "content": "y"}, {"role": "assistant", "content": "z"}]}]
    example = tokenised(load_rows(str(write(kind, tmp_path, rows)), "train"), tokenizer=tokenizer, longest=(128, 8))[0]
    if kind == "parquet":  # pyarrow 17 sorts the fields of a table that it makes from rows
        order = [field.name for field in pyarrow.array(calls).type]
        calls = [{name: call[name] for name in order} for call in calls]
    assert tokenizer.decode(example.prompt_ids) == f"x{json.dumps(calls)}y"


def test_places_are_lines_for_text_and_rows_for_tables(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [e.where.rpartition(", ")[2] for e in tokenised(load_rows(str(tmp_path / "a.jsonl"), "train"))] == [
        "line 1", "line 3",
    ]  # fmt: skip
    (tmp_path / "a.csv").write_text('prompt\n"one\nmore"\nb\n')
    assert [where.rpartition(", ")[2] for where, _ in load_rows(str(tmp_path / "a.csv"), "train")] == [
        "line 3", "line 4",
    ]  # fmt: skip
    parquet = write("parquet", tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    assert [where.rpartition(", ")[2] for where, _ in load_rows(str(parquet), "train")] == ["row 0", "row 1"]


def test_a_missing_split_is_an_error_that_lists_what_is_there_or_no_rows_where_that_is_fine(tmp_path):
    folder = str(write("folder", tmp_path, ROWS))
    with pytest.raises(UserError, match=r"no split 'dev' in .*: it has test.jsonl, train.jsonl"):
        load_rows(folder, "dev")
    assert load_rows(folder, "dev", missing_split_ok=True) == []
    assert len(load_rows(folder, "test")) == 1
    file = str(write("jsonl", tmp_path, ROWS))
    with pytest.raises(UserError, match=r"is one file, so its only split is 'train', not 'test'"):
        load_rows(file, "test")
    assert load_rows(file, "test", missing_split_ok=True) == []
    disk = str(write("save_to_disk", tmp_path, ROWS))
    with pytest.raises(UserError, match=r"no split 'test' in .*: it has train"):
        load_rows(disk, "test")


def bad_file(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', r"a\.jsonl, line 2 is not valid JSON: .* at column \d+"),
        ("a.jsonl", '{"prompt": "a"}\n\n"text"\n', r"a\.jsonl, line 3 holds a str: every line must be one object"),
        ("a.json", '[{"prompt": "a"}]', r"a\.json, line 1 holds a list: every line must be one object"),
        ("a.json", '[\n {"prompt": "a"}\n]', r"a\.json, line 1 is not valid JSON: .* and not all of them in one list"),
        ("a.jsonl", '{"prompt": "\\uD83D"}\n', r"a\.jsonl, line 1 has '\\ud83d', half of a character"),
        ("a.jsonl", b'{"prompt": "\xff\xfe"}\n', r"a\.jsonl is not UTF-8 text \(byte 0xff at 12\): save it as UTF-8"),
        ("a.jsonl", b" " * 20_000 + b"\xe9", r"a\.jsonl is not UTF-8 text \(byte 0xe9 at 20000\): save it as UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n', r"line 2 has 'prompt' more than once: keep"),
        ("a.jsonl", '{"messages": [{"role": "user", "role": "x"}]}\n', r"line 1 has 'role' more than once: keep one"),
        ("a.csv", b"prompt\n\xff\xfe\n", r"a\.csv is not UTF-8 text \(byte 0xff at 7\)"),
        ("a.csv", "prompt,completion\na,b\nc\n", r"a\.csv, line 3 has a different number of fields than the header"),
        ("a.csv", "prompt,completion\na,b,c\n", r"a\.csv, line 2 has a different number of fields"),
        ("a.parquet", "no parquet at all", r"cannot read .*a\.parquet: .*[Pp]arquet"),
        ("a.txt", "a prompt\n", r"a\.txt is of no known kind: name it \.jsonl, \.json, \.parquet or \.csv"),
        ("data", "a prompt\n", r"data is of no known kind"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        load_rows(bad_file(tmp_path, name, content), "train")


def test_a_character_that_is_escaped_in_both_halves_is_read(tmp_path):
    assert load_rows(bad_file(tmp_path, "a.jsonl", '{"prompt": "\\ud83d\\ude00"}\n'), "train")[0][1] == {"prompt": "😀"}


@pytest.mark.parametrize(("name", "content"), [("a.csv", "prompt,completion\na,b\n"), ("a.jsonl", '{"prompt": "a"}\n')])
def test_a_byte_order_mark_as_spreadsheets_write_it_is_no_part_of_the_first_column(tmp_path, name, content):
    rows = load_rows(bad_file(tmp_path, name, b"\xef\xbb\xbf" + content.encode()), "train")
    assert [row["prompt"] for _, row in rows] == ["a"]


def test_a_missing_file_and_a_missing_hub_name_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl not found: check dataset_name \(or prompt_dataset_name\)"):
        load_rows(str(tmp_path / "nowhere.jsonl"), "train")
    with pytest.raises(UserError, match="'no-such-dataset' is no file or folder here, and loading it from the hub"):
        load_rows("no-such-dataset", "train")


def test_a_data_set_of_the_hub_gives_the_split_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": [{"prompt": "a"}], "dev": [{"prompt": "b"}]})
    assert load_rows("some/name", "dev") == [("some/name, dev row 0", {"prompt": "b"})]
    assert load_rows("some/name", "test", missing_split_ok=True) == []
    with pytest.raises(UserError, match="some/name has no split 'test': it has train, dev; see dataset_train_split"):
        load_rows("some/name", "test")


def test_a_folder_with_two_files_for_a_split_or_with_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="it has no data files"):
        load_rows(str(tmp_path), "train")
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    bad_file(tmp_path, "train.csv", "prompt\na\n")
    with pytest.raises(UserError, match=r"several files for split 'train': train.csv, train.jsonl; keep one"):
        load_rows(str(tmp_path), "train")


# -- rows -------------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "reply": "b"}, r"unknown column 'reply'; rename or drop it \(known: prompt, completion"),
        ({"text": "a b"}, "a 'text' column does not say where the prompt ends"),
        ({"prompt": "a", "messages": CHAT}, "exactly one of prompt, messages and input_ids, got prompt and messages"),
        ({"prompt": "a", "input_ids": [5]}, "exactly one of .* got prompt and input_ids"),
        ({"completion": "a"}, "exactly one of prompt, messages and input_ids, got none"),
        ({"prompt": None, "messages": None}, "got none"),
        ({"messages": CHAT, "completion": "b"}, "messages hold the completion already"),
        ({"prompt": ""}, "the prompt has no tokens"),
        ({"input_ids": []}, "the prompt has no tokens"),
        ({"prompt": "a" * 65}, "the prompt has 65 tokens and max_prompt_length is 64: raise it, or drop the row"),
        ({"prompt": "a", "completion": "b" * 64}, "completion has 65 tokens .* max_completion_length is 64"),
        ({"prompt": 3}, "prompt must be text or a list of messages, got int"),
        ({"prompt": "a", "completion": 3}, "completion must be text, got int"),
        ({"input_ids": [5, 260]}, "input_ids has 260, but the tokenizer has 260 tokens"),
        ({"input_ids": [-1]}, "input_ids has -1"),
        ({"input_ids": "12"}, "input_ids must be a list of whole numbers, got '12'"),
        ({"input_ids": [True]}, r"input_ids must be a list of whole numbers, got '\[True\]'"),
        ({"input_ids": [1.5]}, r"input_ids must be a list of whole numbers, got '\[1.5\]'"),
        ({"input_ids": 7}, "input_ids must be a list of whole numbers, got '7'"),
        ({"messages": "hi"}, "messages must be a list of objects with 'role' and 'content'"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": [{"role": "user"}]}, "messages must be a list"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "no turn before the assistant's, so"),
        ({"prompt": [{"content": "a"}]}, "messages must be a list"),
        ({"prompt": CHAT[:1], "completion": [3]}, "messages must be a list"),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
            "content of a message must be text, got NoneType",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, "must be text, got list"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(row, message):
    with pytest.raises(UserError, match=message) as caught:
        tokenised([("data.jsonl, line 7", {"prompt": "fine"}), ("data.jsonl, line 8", row)])
    assert str(caught.value).startswith("data.jsonl, line 8:")


@pytest.mark.parametrize("rows", ["data.jsonl", ["a", "b"], {"train": [{"prompt": "a"}]}])
def test_what_holds_no_rows_is_refused_as_such_and_not_by_its_letters(rows):
    with pytest.raises(UserError, match=r"^row 0 is a str: a row must be a mapping, .* reads those of a file"):
        tokenised(rows)


def test_many_rows_are_tokenised_in_a_call_as_each_is_alone(monkeypatch):
    """Cores are idle while a fast tokenizer has a single text."""
    turn = {"role": "user", "content": "hi"}
    chats = [{"messages": [turn, {"role": "assistant", "content": "yo"}]}, {"prompt": [turn]}]
    rows = [
        {"prompt": "ab", "completion": "c"},
        {"prompt": "x", "completion": ""},
        {"input_ids": [258]},
        *chats,
        ROWS[0],
    ]
    alone = [tokenised([row])[0] for row in rows]
    call, calls = TOKENIZER._encode_plus, []
    monkeypatch.setattr(TOKENIZER, "_encode_plus", lambda *a, **k: calls.append(k) or call(*a, **k))
    for size in (2, 3, 100):
        monkeypatch.setattr("srppo.data.TOKENIZED_AT_ONCE", size)
        calls.clear()
        together = tokenised(rows)
        assert [(e.prompt_ids, e.completion_ids) for e in together] == [(e.prompt_ids, e.completion_ids) for e in alone]
        assert [e.where for e in together] == [f"row {i}" for i in range(len(rows))]
    assert len(calls) == 3  # prompts, prompts of chats, completions


def test_of_several_bad_rows_the_first_is_named_whatever_is_wrong_with_it():
    for bad in ([{"prompt": "x" * 65}, {"text": "y"}], [{"text": "y"}, {"prompt": "x" * 65}]):
        with pytest.raises(UserError, match="row 1"):
            tokenised([{"prompt": "good"}, *bad])


def test_the_same_token_is_one_object_in_all_rows():
    """An integer beyond the first 256 takes 32 bytes, and its place in a list 8."""
    rows = tokenised([{"input_ids": [int("258")]}, {"input_ids": [int("258")]}])
    assert rows[0].prompt_ids[0] is rows[1].prompt_ids[0]


def test_rows_without_a_place_are_counted():
    with pytest.raises(UserError, match=r"^row 1: the prompt has no tokens"):
        tokenised([{"prompt": "a"}, {"prompt": ""}])


def test_empty_training_data_is_refused(tiny_models, tmp_path):
    with pytest.raises(UserError, match="there are no prompts to sample from"):
        trainer(tiny_models, tmp_path, rows=[])


def test_a_tokenizer_without_end_token_needs_stop_tokens():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token, so no completion could end: set stop_token_ids"):
        stop_tokens(tokenizer, None)
    assert stop_tokens(tokenizer, [5, 6]) == [5, 6]
    assert stop_tokens(TOKENIZER, None) == [END]
    for bad in (260, -1):
        with pytest.raises(UserError, match=f"stop_token_ids has {bad}, but the tokenizer has 260 tokens"):
            stop_tokens(TOKENIZER, [5, bad])


def test_padding_is_filled_with_the_pad_token_and_without_one_with_a_stop_token():
    fillers = [filler_token(tiny_tokenizer(pad=pad), [5, 6]) for pad in ("<|pad|>", "<|end|>", None)]
    assert fillers == [1, 0, 5]


def test_the_longest_rows_allowed_are_taken_and_an_answer_of_zero_is_one():
    (example,) = tokenised([{"prompt": "a" * 64, "completion": "b" * 63, "answer": 0}])
    assert (len(example.prompt_ids), len(example.completion_ids), example.answer) == (64, 64, "0")


def test_input_ids_are_taken_as_they_are():
    rows = datasets.Dataset.from_list([{"input_ids": [9, 5, 0, 7], "completion": "b"}])
    (example,) = tokenised(rows)
    assert (example.prompt_ids, example.completion_ids) == ([9, 5, 0, 7], [*ids("b"), END])
    (example,) = tokenised(rows.with_format("torch"))
    assert example.prompt_ids == [9, 5, 0, 7]


def test_an_end_token_that_the_tokenizer_adds_to_the_prompt_is_taken_away_and_one_that_was_written_stays():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[("<|user|>", USER), ("<|end|>", END)]
    )
    plain, written = tokenised([{"prompt": "ab"}, {"prompt": "ab<|end|>"}], tokenizer=tokenizer)
    assert plain.prompt_ids == [USER, *ids("ab")]
    assert written.prompt_ids == [USER, *ids("ab"), END]
    assert tokenised([{"prompt": "ab<|end|>"}])[0].prompt_ids == [*ids("ab"), END]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", USER)]
    )
    assert tokenised([{"prompt": "ab<|end|>"}], tokenizer=tokenizer)[0].prompt_ids == [USER, *ids("ab"), END]
    text, chat = tokenised([{"prompt": "ab", "completion": "c"}, {"messages": CHAT}], tokenizer=tokenizer)
    assert (text.prompt_ids, text.completion_ids) == (
        [USER, *ids("ab")],
        [*ids("c"), END],
    )  # it begins the prompt alone
    assert [*chat.prompt_ids, *chat.completion_ids] == [USER, *ids("hi"), END, ASSISTANT, *ids("yo"), END]


# -- completions ------------------------------------------------------------------------------------------------------


def test_a_demonstration_ends_in_one_stop_token():
    (plain,), (ended,) = (tokenised([{"prompt": "a", "completion": text}]) for text in ("xy", "xy<|end|>"))
    assert plain.completion_ids == ended.completion_ids == [*ids("xy"), END]
    (empty,) = tokenised([{"prompt": "a", "completion": ""}])
    assert empty.completion_ids == [END]


def test_a_completion_is_cut_behind_the_first_stop_token():
    stop = ids(".")[0]
    (example,) = tokenised([{"prompt": "a", "completion": "one. two."}], stops=[stop, END])
    assert example.completion_ids == ids("one.")
    (example,) = tokenised([{"prompt": "a", "completion": "one<|end|> two."}], stops=[stop, END])
    assert example.completion_ids == [*ids("one"), END]
    (example,) = tokenised([{"prompt": "a", "completion": "none"}], stops=[stop, END])
    assert example.completion_ids == [*ids("none"), stop]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9), min_size=1, unique=True))
def test_ending_with_a_stop_token_keeps_all_that_comes_before_it_and_changes_nothing_twice(tokens, stops):
    ended = end_with_stop(tokens, stops)
    assert ended[-1] in stops and not set(ended[:-1]) & set(stops)
    assert ended[:-1] == tokens[: len(ended) - 1]
    assert end_with_stop(ended, stops) == ended


# -- chat -------------------------------------------------------------------------------------------------------------


def test_messages_are_split_at_the_last_assistant_turn():
    conversation = [*CHAT, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "so"}]
    (example,) = tokenised([{"messages": conversation}])
    prompt = [USER, *ids("hi"), END, ASSISTANT, *ids("yo"), END, USER, *ids("and?"), END, ASSISTANT]
    assert example.prompt_ids == prompt
    assert example.completion_ids == [*ids("so"), END]
    (open_end,) = tokenised([{"messages": conversation[:-1]}])
    assert (open_end.prompt_ids, open_end.completion_ids) == (prompt, None)


@pytest.mark.parametrize("completion", ["yo", CHAT[1:]])
def test_a_chat_completion_is_what_the_template_renders(completion):
    (example,) = tokenised([{"prompt": CHAT[:1], "completion": completion}])
    whole = TOKENIZER.apply_chat_template(CHAT, tokenize=False)
    assert [*example.prompt_ids, *example.completion_ids] == ids(whole)


def test_what_a_template_adds_behind_the_stop_token_is_left_out():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>{% endfor %}", "<|end|>\n{% endfor %}")
    (example,) = tokenised([{"messages": CHAT}], tokenizer=tokenizer)
    assert example.completion_ids == [*ids("yo"), END]


def test_messages_without_a_chat_template_are_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="row 0: the tokenizer has no chat template"):
        tokenised([{"messages": CHAT}], tokenizer=tokenizer)


def test_a_template_whose_prompt_is_no_prefix_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(UserError, match="renders the prompt differently once the answer follows"):
        tokenised([{"messages": CHAT}], tokenizer=tokenizer)


def test_a_template_that_refuses_the_messages_says_so_with_the_place():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="row 0: the chat template cannot render these messages: roles must alternate"):
        tokenised([{"messages": CHAT}], tokenizer=tokenizer)


# -- who uses what ----------------------------------------------------------------------------------------------------


def test_sft_takes_rows_as_they_are_or_prepared(tiny_models, tmp_path):
    args = config(tmp_path, base_model_name_or_path=tiny_models.base, stop_token_ids=[0], max_prompt_length=64,
                  max_completion_length=64)  # fmt: skip
    for name, rows in (("raw", ROWS), ("prepared", examples(ROWS))):
        with torch.set_grad_enabled(name == "raw"):  # nor does it matter what a notebook has set
            run_sft(args, train_dataset=rows, output_dir=tmp_path / name)
    raw, prepared = (load_file(tmp_path / name / "model.safetensors") for name in ("raw", "prepared"))
    assert all(torch.equal(raw[name], prepared[name]) for name in prepared)


def test_sft_without_its_settings_names_the_class_that_has_them(tmp_path):
    with pytest.raises(UserError, match="PipelineConfig, not SRPPOConfig"):
        run_sft(SRPPOConfig(), train_dataset=ROWS, output_dir=tmp_path / "sft")


def test_sft_ignores_rows_without_completion_and_ppo_samples_from_all(tiny_models, tmp_path):
    rows = examples([*ROWS[:2], {"prompt": "only a prompt"}, {"prompt": "another"}])
    args = config(tmp_path, base_model_name_or_path=tiny_models.base, sft_num_train_epochs=1, seed=5)
    losses = []
    for name, data in (("with", rows), ("without", rows[:2])):
        run_sft(args, train_dataset=data, output_dir=tmp_path / name, console=QUIET)
        losses.append([json.loads(x)["sft/loss"] for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1] and len(losses[0]) == 1
    run = trainer(tiny_models, tmp_path, rows=rows)
    assert {example.where for example in run.sampler.next()} == {row.where for row in rows}
    run = trainer(tiny_models, tmp_path, rows=[{"prompt": "a", "completion": "of no use here, however long"}])
    assert run.train_dataset[0].completion_ids is None
    with pytest.raises(UserError, match="SFT needs demonstrations, and no row has a completion"):
        run_sft(args, train_dataset=rows[2:], output_dir=tmp_path / "none", console=QUIET)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 3))
def test_the_sampler_gives_every_example_once_before_any_comes_again(count, size, seed):
    rows = examples([{"prompt": "x" * (n + 1)} for n in range(count)])
    sampler = Sampler(rows, size, seed)
    drawn = [len(example.prompt_ids) for _ in range(5) for example in sampler.next()]
    for start in range(0, len(drawn) - count + 1, count):
        assert sorted(drawn[start : start + count]) == list(range(1, count + 1))


def test_the_sampler_resumes_in_the_middle_of_a_pass():
    rows = examples([{"prompt": "x" * (n + 1)} for n in range(7)])
    orders = [Sampler(rows, 7, seed).next() for seed in (0, 0, 99)]
    assert orders[0] == orders[1] != orders[2]
    first, second = Sampler(rows, 3, 0), Sampler(rows, 3, 99)
    first.next()
    second.load_state_dict(first.state_dict())
    for _ in range(5):
        assert first.next() == second.next()
    assert [name for name, value in first.state_dict().items() if torch.is_tensor(value)] == ["generator"]
