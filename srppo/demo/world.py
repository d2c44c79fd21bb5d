"""The demo's world: six string tasks, and three ways to answer each of them.

A prompt is ``<task> <letters>>``, for instance ``swap badge>``. The corpus that the base model is pretrained on answers
every prompt, of every task, in one of three ways, a third of the time each:

=======  =====================================  ========================
way      what it is                             answer to ``swap badge>``
=======  =====================================  ========================
right    the answer, then the end of sequence   ``eadgb``
ramble   the answer, then filler words          ``eadgb so um well``
echo     the prompt's words again               ``swap badge``
=======  =====================================  ========================

The demonstrations show the first way, and of one task only (`DEMONSTRATED_TASK`, "in domain"). Nothing that the
fine-tuning stages see says what a right answer of the other five tasks ("out of domain") should look like: the base
model can already give it, a third of the time. So the score, how often the first way is sampled, measures in domain how
well a model has learnt its demonstrations, and out of domain how far it carried over what they have in common.

Letters are split by a hash of the string and the seed: no string of the held-out prompts occurs in the corpus, in the
demonstrations, or among the prompts of PPO, under any task.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

LETTERS = "abcdefghij"
MIN_LETTERS, MAX_LETTERS = 4, 6
FILLER = ("so", "um", "well", "ok", "hm")
MIN_FILLER, MAX_FILLER = 2, 3
END_OF_PROMPT = ">"

_NEXT_LETTER = str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0])
_PREVIOUS_LETTER = str.maketrans(LETTERS, LETTERS[-1] + LETTERS[:-1])

TASKS: dict[str, Callable[[str], str]] = {
    "copy": lambda s: s,
    "upper": lambda s: s.upper(),
    "next": lambda s: s.translate(_NEXT_LETTER),
    "prev": lambda s: s.translate(_PREVIOUS_LETTER),
    "swap": lambda s: s[-1] + s[1:-1] + s[0],
    "roll": lambda s: s[1:] + s[0],
}
DEMONSTRATED_TASK = "roll"

Way = Literal["right", "ramble", "echo"]
WAYS: tuple[Way, ...] = ("right", "ramble", "echo")
Split = Literal["corpus", "demonstrations", "prompts", "held_out"]
# Hundredths of all strings. The corpus gets most: what a base model must not be is short of examples of the tasks.
_SPLIT_SHARES: dict[Split, int] = {"corpus": 50, "demonstrations": 10, "prompts": 20, "held_out": 20}


@dataclass(frozen=True)
class Example:
    """A prompt and, unless it is there for PPO or for evaluation only, the text that follows it (without EOS)."""

    task: str
    prompt: str
    completion: str | None = None


def make_prompt(task: str, letters: str) -> str:
    """The prompt that asks for ``task`` on ``letters``."""
    return f"{task} {letters}{END_OF_PROMPT}"


def parse_prompt(prompt: str) -> tuple[str, str]:
    """``(task, letters)`` of a prompt; ValueError if it is none of this world."""
    task, _, rest = prompt.partition(" ")
    letters = rest.removesuffix(END_OF_PROMPT)
    if task not in TASKS or not rest.endswith(END_OF_PROMPT) or not letters or set(letters) - set(LETTERS):
        raise ValueError(f"{prompt!r} is not a prompt of the demo; one looks like {make_prompt('swap', 'badge')!r}")
    return task, letters


def answer(prompt: str) -> str:
    """The right answer to ``prompt``, with nothing after it."""
    task, letters = parse_prompt(prompt)
    return TASKS[task](letters)


def respond(prompt: str, way: Way, rng: random.Random) -> str:
    """A completion of ``prompt`` in the given way; ``rng`` draws the filler of a ramble."""
    if way == "right":
        return answer(prompt)
    if way == "ramble":
        words = [rng.choice(FILLER) for _ in range(rng.randint(MIN_FILLER, MAX_FILLER))]
        return " ".join([answer(prompt), *words])
    return prompt.removesuffix(END_OF_PROMPT)


def classify(prompt: str, completion: str, *, ended: bool) -> Way | None:
    """Which of the three ways ``completion`` is, or None if it is none of them.

    ``ended`` is whether the model ended it with EOS. A completion that was cut off is not of the first way, even if its
    text so far is right: whether it stops there is just what the score asks.
    """
    right = answer(prompt)
    if ended and completion == right:
        return "right"
    head, _, filler = completion.partition(" ")
    if head == right and filler and all(word in FILLER for word in filler.split(" ")):
        return "ramble"
    if completion == prompt.removesuffix(END_OF_PROMPT):
        return "echo"
    return None


def longest_completion() -> int:
    """Characters of the longest completion that the corpus can hold (EOS not counted)."""
    ramble = MAX_LETTERS + MAX_FILLER * (1 + max(len(word) for word in FILLER))
    echo = max(len(task) for task in TASKS) + 1 + MAX_LETTERS
    return max(ramble, echo)


class World:
    """Everything that the demo generates. Equal seeds give equal data, in whatever order the parts are asked for."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def split_of(self, letters: str) -> Split:
        """The one split that a string belongs to."""
        bucket = zlib.crc32(f"{self.seed}:{letters}".encode()) % 100
        for split, share in _SPLIT_SHARES.items():
            bucket -= share
            if bucket < 0:
                return split
        raise AssertionError("shares sum to 100")

    def corpus(self, size: int) -> list[Example]:
        """``size`` examples of all tasks, answered in each way a third of the time."""
        rng = self._rng("corpus")
        tasks, examples = list(TASKS), []
        for letters in self._strings("corpus", rng, size, distinct=False):
            prompt = make_prompt(task := rng.choice(tasks), letters)
            examples.append(Example(task, prompt, respond(prompt, rng.choice(WAYS), rng)))
        return examples

    def demonstrations(self, size: int) -> list[Example]:
        """``size`` distinct examples of the first way, all of the demonstrated task."""
        rng = self._rng("demonstrations")
        prompts = [make_prompt(DEMONSTRATED_TASK, s) for s in self._strings("demonstrations", rng, size)]
        return [Example(DEMONSTRATED_TASK, prompt, answer(prompt)) for prompt in prompts]

    def prompts(self, size: int) -> list[Example]:
        """``size`` prompts without completion, of all tasks in turn and in random order."""
        return self._bare("prompts", size)

    def held_out(self, size_per_task: int) -> list[Example]:
        """``size_per_task`` prompts without completion of each task, on strings that no other split has."""
        return self._bare("held_out", size_per_task * len(TASKS))

    def held_out_demonstrations(self, size: int) -> list[Example]:
        """``size`` demonstrations on held-out strings: the demonstrated task's right answers, for evaluation."""
        rng = self._rng("held_out_demonstrations")
        prompts = [make_prompt(DEMONSTRATED_TASK, s) for s in self._strings("held_out", rng, size)]
        return [Example(DEMONSTRATED_TASK, prompt, answer(prompt)) for prompt in prompts]

    def _bare(self, split: Split, size: int) -> list[Example]:
        rng, tasks = self._rng(split), list(TASKS)
        strings = self._strings(split, rng, size)
        examples = [Example(task := tasks[i % len(tasks)], make_prompt(task, s)) for i, s in enumerate(strings)]
        rng.shuffle(examples)
        return examples

    def _rng(self, purpose: str) -> random.Random:
        # A generator per purpose, seeded by a string (which Python hashes with SHA-512, the same on every machine):
        # a longer corpus then leaves the other parts as they were.
        return random.Random(f"{self.seed}:{purpose}")

    def _strings(self, split: Split, rng: random.Random, size: int, *, distinct: bool = True) -> Iterator[str]:
        """``size`` strings of one split; every length is equally likely."""
        seen: set[str] = set()
        # Half of what the split holds of the shortest length, so that rejecting duplicates stays quick.
        most = _SPLIT_SHARES[split] * len(LETTERS) ** MIN_LETTERS // 200 * (MAX_LETTERS - MIN_LETTERS + 1)
        if distinct and size > most:
            raise ValueError(f"the demo's world has at most {most} distinct strings for {split!r}, asked for {size}")
        while size > 0:
            letters = "".join(rng.choices(LETTERS, k=rng.randint(MIN_LETTERS, MAX_LETTERS)))
            if self.split_of(letters) != split or (distinct and letters in seen):
                continue
            seen.add(letters)
            size -= 1
            yield letters
