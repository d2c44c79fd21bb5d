"""ASDiv word problems as demonstrations and prompts.

A problem has a passage ("Three red pens and four blue pens lie on the desk."), a question and an answer ("7
pens"). The answer as it stands is the demonstration: a number and its unit, and stop. The instruct model that plays
the base reasons at length instead, so there is a manner to learn, and code can tell whether it was learnt.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srppo.checkpoint import write_text
from srppo.errors import UserError

MAX_WORDS = 30  # of passage and question: the prompt is nearly all that a CPU computes here, so long stories stay out
ANSWER = re.compile(r"(\d[\d,]*(?:\.\d+)?) [^\d\s][^\d]*")  # "9 apples", "1.2 liters of fruit punch"


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@dataclass(frozen=True)
class Problem:
    passage: str
    question: str
    answer: str  # as the data has it
    number: str  # the number in it

    @property
    def prompt(self) -> list[dict[str, str]]:
        """A chat, as this is an instruct model: the template adds the system turn that it was trained with."""
        return chat(f"{self.passage} {self.question}")

    def as_demonstration(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "completion": self.answer, "answer": self.number}

    def as_prompt(self) -> dict[str, Any]:
        return {"prompt": self.prompt}


@dataclass(frozen=True)
class Split:
    demonstrations: list[Problem]
    prompts: list[Problem]
    held_out: list[Problem]


def parse(lines: Iterable[str], source: str = "ASDiv") -> Iterator[Problem]:
    """The short problems whose answer is one number with a unit; times, ratios, names and yes or no are left out, as
    "the number is right" would mean nothing there."""
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            passage, question, answer = (" ".join(row[name].split()) for name in ("passage", "question", "answer"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{source}, line {place} is no ASDiv problem: it needs passage, question and answer as text"
            ) from None
        match = ANSWER.fullmatch(answer)
        if match and passage and question and len(f"{passage} {question}".split()) <= MAX_WORDS:
            yield Problem(passage, question, answer, match[1].replace(",", ""))


def one_per_passage(problems: Iterable[Problem]) -> list[Problem]:
    """The first problem of each passage. The data has repeats, and several questions on one story: were they spread
    over the splits, the held-out ones would not be new."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem.passage.casefold(), problem)
    return list(first.values())


def split(problems: Iterable[Problem], *, demonstrations: int, prompts: int, held_out: int, seed: int) -> Split:
    """Three disjoint samples, which depend on the seed and the data alone."""
    pool = one_per_passage(problems)
    needed = demonstrations + prompts + held_out
    if len(pool) < needed:
        raise UserError(f"{needed} problems are wanted and the data has {len(pool)} that can be used")
    random.Random(seed).shuffle(pool)
    tail = demonstrations + prompts
    return Split(pool[:demonstrations], pool[demonstrations:tail], pool[tail:needed])


def write(parts: Split, folder: Path) -> None:
    """``train.jsonl``, demonstrations first, and ``test.jsonl``."""
    train = [p.as_demonstration() for p in parts.demonstrations] + [p.as_prompt() for p in parts.prompts]
    test = [p.as_demonstration() for p in parts.held_out]
    write_rows(folder, {"train": train, "test": test})


def write_rows(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    """A ``.jsonl`` file of each split, in their order; each file appears whole or not at all."""
    for name, rows in splits.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
