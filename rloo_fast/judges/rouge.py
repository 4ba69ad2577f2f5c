"""ROUGE-1, ROUGE-2 and ROUGE-L, as F1 of words (Lin, 2004), and the judge that compares by them.

Words are runs of letters and digits in lower case; no stemming, and a text is one sentence.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from ..records import PromptText
from .compare import Pair, Verdict, higher_wins
from .prompt import prompt_text

WORD = re.compile(r"[^\W_]+")
NAMES = ("rouge1", "rouge2", "rougeL")


def rouge(text: str, reference: str) -> dict[str, float]:
    """F1 = 2 overlap / (units of text + units of reference), in [0, 1]; 0 where both have none.

    Units are words (ROUGE-1), pairs of neighbouring words (ROUGE-2), and words again for ROUGE-L,
    whose overlap is the longest common subsequence.
    """
    ours, theirs = WORD.findall(text.lower()), WORD.findall(reference.lower())
    pairs = [list(pairwise(words)) for words in (ours, theirs)]
    return {
        "rouge1": _f1(_shared(ours, theirs), len(ours) + len(theirs)),
        "rouge2": _f1(_shared(*pairs), len(pairs[0]) + len(pairs[1])),
        "rougeL": _f1(_common_subsequence(ours, theirs), len(ours) + len(theirs)),
    }


def mean_rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (see `rouge`), each as its mean over all texts."""
    found = [rouge(*pair) for pair in zip(texts, references, strict=True)]
    return {name: fmean(values[name] for values in found) for name in NAMES}


class RougeJudge:
    """The text with the higher ROUGE-L against the references of its prompt wins; equal: a tie.

    `references`: prompt -> its reference texts, of which the closest counts. Only for the texts of
    two models: a reference that is judged against itself would always win.
    """

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        self.references = references

    def __call__(self, prompts: Sequence[PromptText], pairs: Sequence[Pair]) -> list[Verdict]:
        return [self._judge(*question) for question in zip(prompts, pairs, strict=True)]

    def _judge(self, prompt: PromptText, pair: Pair) -> Verdict:
        references = self.references[prompt_text(prompt)]
        first, second = (max(rouge(text, r)["rougeL"] for r in references) for text in pair)
        return higher_wins(first, second)


def _f1(overlap: int, units: int) -> float:
    return 2 * overlap / units if units else 0.0


def _shared(ours: Sequence, theirs: Sequence) -> int:
    return (Counter(ours) & Counter(theirs)).total()


def _common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest sequence of words that both have in this order, gaps allowed.

    Rows of the usual table as bits of one number (Hyyrö, 2004): bit j of `row` is 0 where one more
    word of theirs[:j + 1] than of theirs[:j] is matched by the words of `ours` so far.
    """
    places: dict[str, int] = defaultdict(int)
    for j, word in enumerate(theirs):
        places[word] |= 1 << j
    every = row = (1 << len(theirs)) - 1
    for word in ours:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(theirs) - row.bit_count()
