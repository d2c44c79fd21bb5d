"""Demonstrations and prompts: from files, folders or the hub to token ids.

A row has a ``prompt`` (text, or a list of chat messages) and, if it is a demonstration, a ``completion``; or
``messages``, split at the last assistant turn; or ``input_ids``, a prompt that is tokenised already. Rows without a
completion serve PPO only. ``answer`` is for ``srppo eval``'s exact match, and ``id`` stands in what ``srppo score`` and
``srppo eval`` write of the row. Prompt and completion are tokenised apart, because a rollout starts at that token
boundary too; every demonstration ends in a stop token.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError

from srppo.errors import UserError, wrong_byte

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from srppo.config import SRPPOConfig

COLUMNS = ("prompt", "completion", "messages", "input_ids", "answer", "id")
FILE_KINDS = (".jsonl", ".json", ".parquet", ".csv")
TOKENIZED_AT_ONCE = 1000  # rows; a fast tokenizer takes all cores for many texts, and one for a single text


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row. ``completion_ids`` ends in a stop token, and is None where the row is a prompt only."""

    prompt_ids: list[int]
    completion_ids: list[int] | None
    answer: str | None
    where: str
    id: int | str | None = None

    @property
    def key(self) -> dict[str, int | str]:
        """What tells which row an output is about, where the row has an id."""
        return {} if self.id is None else {"id": self.id}


def digest(examples: Iterable[Example]) -> str:
    """What tells rows from others."""
    found = hashlib.sha256()
    for example in examples:
        found.update(repr((example.prompt_ids, example.completion_ids, example.answer)).encode())
    return found.hexdigest()


# -- reading ----------------------------------------------------------------------------------------------------------


def load_rows(source: str, split: str, *, missing_split_ok: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """Rows of one split of ``source``, each with its place ("file.jsonl, line 3") for error messages.

    A file is the ``train`` split. A folder holds ``<split>.jsonl`` (or .json, .parquet, .csv), or is what
    ``datasets.save_to_disk`` wrote. Anything else is taken for a hub name. A missing split is an error that lists those
    there are, or with ``missing_split_ok`` no rows.
    """
    path = Path(source)
    if path.is_dir():
        return rows_from_folder(path, split, missing_split_ok)
    if path.suffix in FILE_KINDS or path.exists():
        if not path.is_file():
            raise UserError(
                f"data file {source} not found: check dataset_name (or prompt_dataset_name); relative paths start at "
                f"{Path.cwd()}"
            )
        if split != "train":
            if missing_split_ok:
                return []
            raise UserError(
                f"{source} is one file, so its only split is 'train', not {split!r}: put {split}.jsonl in a folder"
            )
        return read_file(path)
    return rows_from_hub(source, split, missing_split_ok)


def rows_from_folder(folder: Path, split: str, missing_split_ok: bool) -> list[tuple[str, dict[str, Any]]]:
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        import datasets

        try:
            loaded = datasets.load_from_disk(str(folder))
            splits = loaded if isinstance(loaded, Mapping) else {"train": loaded}
            if split in splits:
                return [(f"{folder}, {split} row {i}", dict(row)) for i, row in enumerate(splits[split])]
        except Exception as error:  # of a damaged file: whatever its reader trips over
            raise UserError(f"cannot read the data set in {folder}: {error}") from error
        names = sorted(splits)
    else:
        files = sorted(f for f in folder.iterdir() if f.suffix in FILE_KINDS)
        chosen = [f for f in files if f.stem == split]
        if len(chosen) > 1:
            raise UserError(
                f"{folder} has several files for split {split!r}: {', '.join(f.name for f in chosen)}; keep one"
            )
        if chosen:
            return read_file(chosen[0])
        names = [f.name for f in files]
    if missing_split_ok:
        return []
    raise UserError(
        f"no split {split!r} in {folder}: it has {', '.join(names) or 'no data files'}; see dataset_train_split"
    )


def rows_from_hub(name: str, split: str, missing_split_ok: bool) -> list[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub client has no common base class for its errors
        raise UserError(f"{name!r} is no file or folder here, and loading it from the hub failed: {error}") from error
    if split not in loaded:
        if missing_split_ok:
            return []
        raise UserError(f"{name} has no split {split!r}: it has {', '.join(loaded)}; see dataset_train_split")
    return [(f"{name}, {split} row {i}", dict(row)) for i, row in enumerate(loaded[split])]


def read_file(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """All rows of one JSONL, Parquet or CSV file."""
    if path.suffix not in FILE_KINDS:
        raise UserError(f"{path} is of no known kind: name it {', '.join(FILE_KINDS[:-1])} or {FILE_KINDS[-1]}")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
            return [(f"{path}, row {i}", row) for i, row in enumerate(table.to_pylist())]
        text = path.read_bytes().decode().removeprefix("\ufeff")  # spreadsheets write a byte order mark
        if path.suffix == ".csv":
            return list(rows_from_csv(path, io.StringIO(text, newline="")))
        return list(rows_from_jsonl(path, io.StringIO(text, newline=None)))
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text {wrong_byte(error)}") from None
    except (OSError, csv.Error, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


class RepeatedName(Exception):
    """A name that an object of a JSON line has twice, of which Python's parser would take the last."""


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in pairs:
        if name in row:
            raise RepeatedName(name)
        row[name] = value
    return row


def rows_from_jsonl(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=unique_names)
        except RepeatedName as error:
            raise UserError(f"{where} has {error.args[0]!r} more than once: keep one") from None
        except json.JSONDecodeError as error:
            hint = "one object a line" + ", and not all of them in one list" * line.startswith("[")
            raise UserError(f"{where} is not valid JSON: {error.msg} at column {error.colno}; {hint}") from None
        if not isinstance(row, dict):
            raise UserError(
                f'{where} holds a {type(row).__name__}: every line must be one object, such as {{"prompt": ...}}'
            )
        if "\\ud" in line.lower():  # JSON can hold half of an emoji, and no tokenizer takes it
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start]
                raise UserError(
                    f"{where} has {half!r}, half of a character, as of text that was cut: repair it, or drop the row"
                ) from None
        yield where, row


def rows_from_csv(path: Path, file: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(file)
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if None in row or None in row.values():
            raise UserError(f"{where} has a different number of fields than the header")
        yield where, {name: value or None if name in ("completion", "answer") else value for name, value in row.items()}


# -- tokenising -------------------------------------------------------------------------------------------------------


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int] | None) -> list[int]:
    """The tokens that end a completion: those asked for, else the tokenizer's EOS."""
    if stop_token_ids:
        size = len(tokenizer)
        for token in stop_token_ids:
            if not 0 <= token < size:
                raise UserError(f"stop_token_ids has {token}, but the tokenizer has {size} tokens")
        return list(stop_token_ids)
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so no completion could end: set stop_token_ids")
    return [int(tokenizer.eos_token_id)]


def filler_token(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> int:
    """What padding is filled with: the pad token, or where there is none a stop token. No mask is derived from it."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_token_ids[0])


Dataset = Sequence["Example"] | Iterable[Mapping[str, Any]] | Iterable[tuple[str, Mapping[str, Any]]]


def as_examples(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int],
    args: SRPPOConfig,
    *,
    prompts_only: bool = False,
) -> list[Example]:
    """Rows as :func:`prepare` makes them with the limits of ``args``; what it made before stays as it is."""
    rows = list(dataset)
    if all(isinstance(row, Example) for row in rows):
        return rows  # type: ignore[return-value]
    return prepare(
        rows,  # type: ignore[arg-type]
        tokenizer,
        stop_token_ids=stop_token_ids,
        max_prompt_length=args.max_prompt_length,
        max_completion_length=args.max_completion_length,
        prompts_only=prompts_only,
    )


def prepare(
    rows: Iterable[tuple[str, Mapping[str, Any]]] | Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_token_ids: Sequence[int],
    max_prompt_length: int,
    max_completion_length: int,
    prompts_only: bool = False,
) -> list[Example]:
    """Tokenises rows, many in a call; the first bad one is an error that names its place and what to do.

    Args:
        rows: what :func:`load_rows` gives, or plain mappings (a list of dicts, a ``datasets.Dataset``).
        stop_token_ids: a completion that ends in none of them gets the first one appended.
        max_prompt_length, max_completion_length: in tokens; a longer row is an error, never cut in silence.
        prompts_only: completions are left out, however long.
    """
    examples = []
    same: dict[int, int] = {}
    numbered = enumerate(rows)
    while chunk := list(itertools.islice(numbered, TOKENIZED_AT_ONCE)):
        read, mistake = [], None
        for number, item in chunk:
            where, row = item if isinstance(item, tuple) else (f"row {number}", item)
            try:
                texts = texts_of(where, row, tokenizer)
            except UserError as error:  # told after those of the rows before it
                mistake = error
                break
            read.append((where, row, dataclasses.replace(texts, completion=None) if prompts_only else texts))
        tokenized = tokenize_all([texts for _, _, texts in read], tokenizer, stop_token_ids)
        for (where, row, _), (prompt_ids, completion_ids) in zip(read, tokenized, strict=True):
            check_lengths(where, prompt_ids, completion_ids, max_prompt_length, max_completion_length)
            # one object for each token of the vocabulary, and not for each in the data: 32 bytes of 40
            prompt_ids = [same.setdefault(token, token) for token in prompt_ids]
            completion_ids = completion_ids and [same.setdefault(token, token) for token in completion_ids]
            answer, key = row.get("answer"), row.get("id")
            answer = None if answer is None else str(answer)
            key = key if key is None or isinstance(key, int) else str(key)
            examples.append(Example(prompt_ids, completion_ids, answer, where, key))
        if mistake is not None:
            raise mistake
    return examples


def check_lengths(
    where: str, prompt_ids: list[int], completion_ids: list[int] | None, longest_prompt: int, longest_completion: int
) -> None:
    if not prompt_ids:
        raise UserError(f"{where}: the prompt has no tokens; give it at least one character, or drop the row")
    if len(prompt_ids) > longest_prompt:
        raise UserError(
            f"{where}: the prompt has {len(prompt_ids)} tokens and max_prompt_length is {longest_prompt}: "
            "raise it, or drop the row"
        )
    if completion_ids is not None and len(completion_ids) > longest_completion:
        raise UserError(
            f"{where}: the completion has {len(completion_ids)} tokens with its stop token and max_completion_length "
            f"is {longest_completion}: raise it, or drop the row (a cut demonstration would teach not to stop)"
        )


@dataclass(frozen=True, slots=True)
class Texts:
    """What a row says, before it is tokenised; a prompt may be so already."""

    prompt: str | list[int]
    completion: str | None
    rendered: bool = False  # by a chat template, which has written the special tokens itself


def tokenize_row(
    where: str, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]
) -> tuple[list[int], list[int] | None]:
    return tokenize_all([texts_of(where, row, tokenizer)], tokenizer, stop_token_ids)[0]


def texts_of(where: str, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Texts:
    """The texts of a row; whatever is wrong with it but their lengths is an error."""
    if not isinstance(row, Mapping):  # of a path, or a DatasetDict, the rows would be letters or names of splits
        raise UserError(
            f"{where} is a {type(row).__name__}: a row must be a mapping, such as {{'prompt': ...}}; "
            "srppo.data.load_rows reads those of a file"
        )
    check_columns(where, row)
    prompt, completion = row.get("prompt"), row.get("completion")
    if row.get("messages") is not None:
        if completion is not None:
            raise UserError(f"{where}: messages hold the completion already; drop the completion, or give a prompt")
        prompt, completion = split_messages(where, row["messages"])
    if row.get("input_ids") is not None:
        prompt = checked_ids(where, row["input_ids"], len(tokenizer))
    elif isinstance(prompt, list):
        return rendered(where, prompt, completion, tokenizer)
    elif not isinstance(prompt, str):
        raise UserError(f"{where}: prompt must be text or a list of messages, got {type(prompt).__name__}")
    if completion is not None and not isinstance(completion, str):
        raise UserError(f"{where}: completion must be text, got {type(completion).__name__}")
    return Texts(prompt, completion)


def tokenize_all(
    rows: Sequence[Texts], tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]
) -> list[tuple[list[int], list[int] | None]]:
    """Prompt and completion of each row, as the tokenizer gives them alone; all texts of a kind in one call."""

    def ids_of(texts: list[str], special: bool) -> Iterator[list[int]]:
        return iter(tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else [])

    plain = ids_of([row.prompt for row in rows if isinstance(row.prompt, str) and not row.rendered], True)
    chats = ids_of([row.prompt for row in rows if isinstance(row.prompt, str) and row.rendered], False)
    completions = ids_of([row.completion for row in rows if row.completion is not None], False)
    found = []
    for row in rows:
        prompt_ids = row.prompt if isinstance(row.prompt, list) else next(chats if row.rendered else plain)
        if isinstance(row.prompt, str) and not row.rendered:
            prompt_ids = without_added_end(row.prompt, prompt_ids, tokenizer)
        ended = None if row.completion is None else end_with_stop(next(completions), stop_token_ids)
        found.append((prompt_ids, ended))
    return found


def without_added_end(prompt: str, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Some tokenizers end every text with EOS, and a completion must follow here; one that was written stays."""
    if not prompt or not prompt_ids or prompt_ids[-1] != tokenizer.eos_token_id:
        return prompt_ids
    written = [*tokenizer(prompt, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return prompt_ids[:-1] if prompt_ids[-len(written) :] == written else prompt_ids


def whole_numbers(ids: Iterable[Any]) -> list[int]:
    """Token ids as plain integers; ``TypeError`` where one is none, as a float, a bool or text."""
    tokens = list(ids)
    if any(isinstance(token, bool) for token in tokens):  # operator.index takes True for 1
        raise TypeError
    return [operator.index(token) for token in tokens]


def checked_ids(where: str, ids: Any, vocabulary: int) -> list[int]:
    try:
        tokens = whole_numbers(ids)
    except TypeError:
        raise UserError(f"{where}: input_ids must be a list of whole numbers, got {str(ids)[:40]!r}") from None
    bad = [token for token in tokens if not 0 <= token < vocabulary]
    if bad:
        raise UserError(f"{where}: input_ids has {bad[0]}, but the tokenizer has {vocabulary} tokens")
    return tokens


def check_columns(where: str, row: Mapping[str, Any]) -> None:
    if "text" in row:
        raise UserError(
            f"{where}: a 'text' column does not say where the prompt ends, and PPO samples from there on: "
            "split it into 'prompt' and 'completion'"
        )
    unknown = [name for name in row if name not in COLUMNS]
    if unknown:
        raise UserError(f"{where}: unknown column {unknown[0]!r}; rename or drop it (known: {', '.join(COLUMNS)})")
    starts = [name for name in ("prompt", "messages", "input_ids") if row.get(name) is not None]
    if len(starts) != 1:
        got = " and ".join(starts) if starts else "none"
        raise UserError(f"{where}: a row needs exactly one of prompt, messages and input_ids, got {got}")


def split_messages(where: str, messages: Any) -> tuple[list[Any], list[Any] | None]:
    """Everything before the last assistant turn is the prompt; a conversation that ends in another role is a prompt."""
    check_messages(where, messages)
    if messages[-1]["role"] == "assistant":
        if len(messages) == 1:
            raise UserError(f"{where}: there is no turn before the assistant's, so there is no prompt: drop the row")
        return messages[:-1], messages[-1:]
    return messages, None


def check_messages(where: str, messages: Any) -> None:
    good = (
        isinstance(messages, list)
        and messages
        and all(isinstance(m, dict) and "role" in m and ("content" in m or m.get("tool_calls")) for m in messages)
    )
    if not good:
        raise UserError(f"{where}: messages must be a list of objects with 'role' and 'content'")
    for message in messages:
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue  # as chat APIs write a turn that only calls tools
        if not isinstance(content, str):  # a template would print None, or a list's brackets, in silence
            raise UserError(
                f"{where}: the content of a message must be text, got {type(content).__name__}: give the text, or drop "
                "the row"
            )


def rendered(where: str, prompt: list[Any], completion: Any, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Renders with the chat template; the completion is what the template adds to the rendered prompt, up to its
    stop."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{where}: the tokenizer has no chat template, so messages cannot be rendered; give prompt as text"
        )
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    for part in (prompt, completion):
        if part is not None:
            check_messages(where, part)
    prompt, completion = with_content(prompt), completion and with_content(completion)
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = None if completion is None else tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    except (TemplateError, TypeError) as error:
        raise UserError(f"{where}: the chat template cannot render these messages: {error}") from None
    if whole is None:
        return Texts(text, None, rendered=True)
    if not whole.startswith(text):
        raise UserError(
            f"{where}: the chat template renders the prompt differently once the answer follows, so the two cannot be "
            f"told "
            "apart; give prompt and completion as text"
        )
    return Texts(text, whole[len(text) :], rendered=True)


def with_content(messages: list[Any]) -> list[Any]:
    """Messages as a template can take them: without nulls, and a turn that only calls tools with no text."""
    clean = without_nulls(messages)
    for message in clean:
        message.setdefault("content", "")
    return clean


def without_nulls(value: Any) -> Any:
    """A message without the names that have no value. A table gives every object the names of all in its column, such
    as the arguments of other tools, and a template would write them as null."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def end_with_stop(ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in stop_token_ids:
            return ids[: position + 1]
    return [*ids, stop_token_ids[0]]


# -- batching ---------------------------------------------------------------------------------------------------------


class Sampler:
    """Endless batches of examples: every example once before any comes again, reshuffled each pass; resumable."""

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int) -> None:
        self.examples, self.batch_size = examples, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.queue: list[int] = []

    def next(self) -> list[Example]:
        while len(self.queue) < self.batch_size:
            self.queue += torch.randperm(len(self.examples), generator=self.generator).tolist()
        batch, self.queue = self.queue[: self.batch_size], self.queue[self.batch_size :]
        return [self.examples[index] for index in batch]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": len(self.examples), "queue": list(self.queue), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another sampler of the same data was.

        Raises:
            UserError: the data has more rows or fewer than it had.
        """
        if state["rows"] != len(self.examples):
            raise UserError(
                f"the training data has {len(self.examples)} prompts and had {state['rows']} when the checkpoint was "
                "written: resume with the same data, or start a new run from the checkpoint's model"
            )
        self.queue = list(state["queue"])
        self.generator.set_state(state["generator"])
