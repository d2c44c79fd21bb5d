"""SGPO's improver step: one model is policy and improver, and learns from its own improved answers.

Self-improving preference optimization as reported of arXiv 2507.20181 [second-hand]: the improver, which is the policy
itself under another prompt, rewrites the policy's answer with the demonstration at hand; DPO then prefers the improved
answer to the current one.

**The paper's formulas and prompts were not found.** What follows is a reconstruction from that one sentence: the prompt
template is ours, and so is leaving out answers that the improver did not change. The loss is ``srppo.losses.dpo``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

__all__ = ["TEMPLATE", "improve", "improver_prompts"]

TEMPLATE = (
    "Question:\n{prompt}\n\nAn answer to improve:\n{answer}\n\nA good answer, for reference:\n{demonstration}\n\n"
    "Rewrite the answer so that it is as good as the reference, changing as little as needed. Give the rewritten "
    "answer only.\n"
)


def improver_prompts(
    prompts: Sequence[str], answers: Sequence[str], demonstrations: Sequence[str], *, template: str = TEMPLATE
) -> list[str]:
    """What the improver is asked: the template with prompt, current answer and demonstration in their places.

    Raises:
        ValueError: lists of different lengths; a template that lacks one of the three.
    """
    counts = {len(prompts), len(answers), len(demonstrations)}
    if len(counts) != 1:
        raise ValueError(
            f"improve: got {len(prompts)} prompts, {len(answers)} answers and {len(demonstrations)} demonstrations; "
            f"each prompt needs one of both"
        )
    fields = ("prompt", "answer", "demonstration")
    missing = [field for field in fields if "{" + field + "}" not in template]
    if missing:
        raise ValueError(f"improve: the template has no {{{missing[0]}}}")
    # One pass over the template: braces, or a field's name, in an answer are text.
    pattern = re.compile("|".join(re.escape("{" + field + "}") for field in fields))
    filled = []
    for values in zip(prompts, answers, demonstrations, strict=True):
        parts = dict(zip(fields, values, strict=True))
        filled.append(pattern.sub(lambda found, parts=parts: parts[found[0][1:-1]], template))  # type: ignore[misc]
    return filled


def improve(
    prompts: Sequence[str],
    answers: Sequence[str],
    demonstrations: Sequence[str],
    rewrite: Callable[[list[str]], Sequence[str]],
    *,
    template: str = TEMPLATE,
) -> list[dict[str, str]]:
    """The improver step: preference rows ``{"prompt", "chosen", "rejected"}``, chosen improved and rejected current.

    Args:
        prompts, answers, demonstrations: text; an answer is the policy's own, a demonstration the prompt's.
        rewrite: the policy as improver: a completion for each of the texts that it gets.
        template: see :func:`improver_prompts`.

    Returns:
        The rows, without those whose answer came back empty or as it was.

    Raises:
        ValueError: as :func:`improver_prompts`; a ``rewrite`` that returns another number of texts.
    """
    asked = improver_prompts(prompts, answers, demonstrations, template=template)
    improved = list(rewrite(asked))
    if len(improved) != len(asked):
        raise ValueError(f"improve: rewrite returned {len(improved)} texts for {len(asked)} prompts")
    rows = []
    for prompt, answer, better in zip(prompts, answers, improved, strict=True):
        if better.strip() and better.strip() != answer.strip():
            rows.append({"prompt": prompt, "chosen": better, "rejected": answer})
    return rows
