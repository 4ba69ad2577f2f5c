"""Win rates do not depend on the order of the texts; what a judge may return."""

from __future__ import annotations

import pytest
import torch

from rloo_fast.judges.compare import JudgeError, Verdict, compare, higher_wins
from rloo_fast.judges.endpoint import OpenAIJudge
from rloo_fast.judges.figures import summarize
from tests.support.judge_runs import longer, serving


def texts_with_lengths(lengths):
    return ["x" * length for length in lengths]


def test_win_rate_is_that_of_the_rule_whatever_the_order():
    ours, theirs = texts_with_lengths([9, 9, 9, 1, 1, 9, 9, 1]), texts_with_lengths([5] * 8)
    for seed in range(3):
        with serving(longer) as url:
            rows = compare(OpenAIJudge(url, "some-judge"), ["p"] * 8, ours, theirs, seed=seed)
        figures = summarize(rows)
        assert figures["win_rate"] == 5 / 8
        assert (figures["num_wins"], figures["num_losses"]) == (5, 3)


def test_judge_that_takes_the_first_gets_half_and_is_found_out():
    rows = compare(lambda prompts, pairs: [0] * 100, ["p"] * 100, ["a"] * 100, ["b"] * 100)
    figures = summarize(rows)
    assert figures["win_rate"] == 0.5
    assert figures["first_won"] == 1.0


def test_order_follows_from_the_seed():
    def places(seed):
        rows = compare(lambda _, pairs: [0] * 64, ["p"] * 64, ["a"] * 64, ["b"] * 64, seed=seed)
        return [row[0].place for row in rows]

    assert places(1) == places(1) != places(2)
    assert sum(places(1)) == 32
    assert sum(places(1)[:32]) not in (0, 16, 32)  # drawn, not one after the other


def test_judge_sees_each_text_at_the_place_that_is_noted():
    seen = []

    def judge(prompts, pairs):
        seen.extend(pairs)
        return [1] * len(pairs)

    rows = compare(judge, ["p"] * 20, ["ours"] * 20, ["theirs"] * 20)
    assert [pair.index("ours") for pair in seen] == [row[0].place for row in rows]


def test_both_orders_count_a_disagreement_as_half():
    verdicts = iter([[0] * 4, [0] * 4])  # always the first: every pair disagrees with itself
    rows = compare(lambda *_: next(verdicts), ["p"] * 4, ["a"] * 4, ["b"] * 4, both_orders=True)
    figures = summarize(rows)
    assert [row[0].place + row[1].place for row in rows] == [1] * 4
    assert (figures["win_rate"], figures["num_split"], figures["num_asked"]) == (0.5, 4, 8)


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        ([0], "one verdict per pair: got 1 for 2"),
        ([0, 2], "0, 1 or None, got 2"),
        ([0, 0.7], "0, 1 or None, got 0.7"),
        (7, "a list of 0, 1 or None, got int"),
    ],
    ids=["too-few", "no-index", "a-score", "no-list"],
)
def test_judge_that_breaks_its_contract_is_an_error(returned, sentence):
    with pytest.raises(JudgeError, match=sentence):
        compare(lambda prompts, pairs: returned, ["p"] * 2, ["a"] * 2, ["b"] * 2)


def test_judge_that_raises_is_named_with_its_line():
    def careless(prompts, pairs):
        raise OSError("no tape")

    sentence = r"the judge careless raised OSError: no tape \(test_compare.py, line \d+\)"
    with pytest.raises(JudgeError, match=sentence):
        compare(careless, ["p"], ["a"], ["b"])


def test_an_error_of_a_judge_has_no_secret(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "pL4nt-0a1b2c3d4e5f")

    def careless(prompts, pairs):
        raise OSError("401 for pL4nt-0a1b2c3d4e5f")

    with pytest.raises(JudgeError, match="raised OSError: 401 for <masked>"):
        compare(careless, ["p"], ["a"], ["b"])


def test_a_reward_that_is_no_number_is_no_verdict():
    nan = float("nan")
    assert [higher_wins(*both)[:2] for both in ((nan, 1.0), (1.0, nan), (1.0, 2.0))] == [
        (None, "not a number"), (None, "not a number"), (1, ""),
    ]  # fmt: skip


def test_what_a_function_says_is_written_as_text():
    rows = compare(lambda *_: [Verdict(0, "", torch.ones(1))], ["p"], ["a"], ["b"])
    assert rows[0][0].verdict.answer == "tensor([1.])"


def test_verdicts_may_be_tensor_items_and_none():
    verdicts = torch.tensor([1, 0])
    rows = compare(lambda *_: [*verdicts, None], ["p"] * 3, ["a"] * 3, ["b"] * 3)
    assert [row[0].verdict.index for row in rows] == [1, 0, None]
    assert summarize(rows)["no_verdict"] == {"none given": 1}
