"""ROUGE by hand, and the judge that compares by it."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from rloo_fast.judges.compare import TIE
from rloo_fast.judges.rouge import RougeJudge, rouge


def test_rouge_by_hand():
    # of 4 and 6 words 3 are shared (the, cat, sat); pairs: 3 and 5, shared (the cat), (cat sat)
    # in order: the cat sat
    scores = rouge("The cat sat down.", "the cat sat on the mat")
    assert scores == {"rouge1": 6 / 10, "rouge2": 4 / 8, "rougeL": 6 / 10}


def test_rouge_counts_repeats_once_and_keeps_order():
    assert rouge("a a a", "a b")["rouge1"] == 2 / 5
    assert rouge("d c b a", "a b c d") == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 2 / 8}
    assert rouge("a", "a a")["rougeL"] == 2 / 3  # one word is not matched twice
    # gaps may be on both sides: a c e g
    assert rouge("a x c y e g", "a c z e w g")["rougeL"] == 8 / 12


def test_rouge_of_empty_texts_is_zero():
    assert set(rouge("", "a").values()) == set(rouge("", "").values()) == {0.0}


def test_rouge_judge_takes_the_closest_of_a_prompts_references():
    judge = RougeJudge({"p": ["a b c", "x y"]})
    pairs = [("a b", "z"), ("z", "x y"), ("b", "c")]
    assert [v.index for v in judge(["p"] * 3, pairs)] == [0, 1, None]
    assert judge(["p"], [("b", "c")])[0].why == TIE


def test_the_longest_common_subsequence_is_that_of_the_table():
    draw = random.Random(0)
    for _ in range(50):
        ours, theirs = (draw.choices("abcd", k=draw.randint(0, 12)) for _ in range(2))
        subsequences = (
            list(part)
            for size in range(len(ours) + 1)
            for part in itertools.combinations(ours, size)
            if is_subsequence(part, theirs)
        )
        longest = max(map(len, subsequences))
        units = len(ours) + len(theirs)
        wanted = 2 * longest / units if units else 0.0
        assert rouge(" ".join(ours), " ".join(theirs))["rougeL"] == wanted


def is_subsequence(part, whole) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


def test_long_texts_do_not_take_the_product_of_their_lengths():
    started = time.monotonic()
    assert rouge("a b c " * 6_000, "b c d " * 6_000)["rougeL"] == pytest.approx(2 / 3)
    assert time.monotonic() - started < 10  # a table of 324 million cells takes minutes
