"""ROUGE-1, ROUGE-2 and ROUGE-L, as F1 of words (Lin, 2004), and the judge that compares by them.

Words are runs of letters and digits in lower case; no stemming, and a text is one sentence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from ..types import PromptText
from .compare import Pair, Verdict, by_score
from .prompt import prompt_text

WORD = re.compile(r"[^\W_]+")
NAMES = ("rouge1", "rouge2", "rougeL")


def rouge(text: str, reference: str) -> dict[str, float]:
    """F1 = 2 overlap / (units of text + units of reference), in [0, 1]; 0 where both have none.

    Units are words, pairs of neighbouring words, and for ROUGE-L words again, the overlap of which
    is their longest common subsequence.
    """
    ours, theirs = WORD.findall(text.lower()), WORD.findall(reference.lower())
    pairs = [list(pairwise(words)) for words in (ours, theirs)]
    return {
        "rouge1": _f1(_shared(ours, theirs), len(ours) + len(theirs)),
        "rouge2": _f1(_shared(*pairs), len(pairs[0]) + len(pairs[1])),
        "rougeL": _f1(_common_subsequence(ours, theirs), len(ours) + len(theirs)),
    }


def mean_rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean of each over all texts."""
    scores = [rouge(*pair) for pair in zip(texts, references, strict=True)]
    return {name: fmean(score[name] for score in scores) for name in NAMES}


class RougeJudge:
    """The text with the higher ROUGE-L against the references of its prompt; equal: a tie.

    `references`: prompt -> its reference texts, the closest of which counts. Only for the texts of
    two models: a reference compared with anything else would win by being itself.
    """

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        self.references = references

    def __call__(self, prompts: Sequence[PromptText], pairs: Sequence[Pair]) -> list[Verdict]:
        return [self._judge(*question) for question in zip(prompts, pairs, strict=True)]

    def _judge(self, prompt: PromptText, pair: Pair) -> Verdict:
        references = self.references[prompt_text(prompt)]
        first, second = (max(rouge(text, r)["rougeL"] for r in references) for text in pair)
        return by_score(first, second)


def _f1(overlap: int, units: int) -> float:
    return 2 * overlap / units if units else 0.0


def _shared(ours: Sequence, theirs: Sequence) -> int:
    return (Counter(ours) & Counter(theirs)).total()


def _common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest sequence of words that both have in this order, gaps allowed."""
    best = [0] * (len(theirs) + 1)  # best[j]: of the words of `ours` so far and theirs[:j]
    for word in ours:
        before = 0  # best[j] of the former word
        for j, other in enumerate(theirs):
            former = best[j + 1]
            best[j + 1] = before + 1 if word == other else max(former, best[j])
            before = former
    return best[-1]
