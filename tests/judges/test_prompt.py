"""The question that a language model is asked, and how its answer is read."""

from __future__ import annotations

import pytest

from rloo_fast.judges.prompt import DEFAULT, fill, read_answer
from tests.support.judge_runs import TEXTS


def test_question_holds_the_texts_at_their_places():
    question = fill(DEFAULT, "the post", (" first {text1} ", "second"))
    assert TEXTS.findall(question) == ["first {text1}", "second"]
    assert "<post>\nthe post\n</post>" in question


def test_question_of_a_conversation():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert fill("{prompt}|{text0}|{text1}", prompt, ("a", "b")).startswith(
        "system: Be brief.\n\nuser: Hi|a|b"
    )
    assert fill("{prompt}", prompt[1:], ("a", "b")) == "Hi"


@pytest.mark.parametrize(
    ("answer", "index"),
    [("0", 0), (" 1.\n", 1), ("**1**", 1), ('"0"', 0), ("10", None), ("Summary 1", None),
     ("", None), ("-1", None), ("0 or 1", None)],
)  # fmt: skip
def test_answer_is_read_strictly(answer, index):
    assert read_answer(answer) == index


def test_answer_after_the_last_marker():
    assert read_answer("VERDICT: 0? No.\nVERDICT: 1", "VERDICT:") == 1
    assert read_answer("1", "VERDICT:") is None
    assert read_answer("VERDICT: the first", "VERDICT:") is None
