"""Answers outlive a judge that fails: the same command asks only the rest."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from rloo_fast.judges.answers import Answers
from rloo_fast.judges.compare import JudgeError
from rloo_fast.judges.endpoint import OpenAIJudge
from rloo_fast.judges.prompt import DEFAULT
from tests.support.judge_runs import Dying, judge_by, longer, result, rows_file, serving, texts_file


def judged_in_part(rule, *argv):
    """12 pairs in a.jsonl and rows.jsonl, of which the server judges some; its address."""
    rows = rows_file()
    texts_file("a.jsonl", [f"{'x' * (5 * i % 23)}{i}" for i in range(12)], rows)
    with serving(rule) as url:
        judge_by(url, *argv, status=2)
    return url


def again(url, rule, *argv, **options):
    with serving(rule, urlsplit(url).port):
        judge_by(url, *argv, **options)


def test_judge_that_died_is_asked_the_rest_and_the_result_is_that_of_one_that_did_not(capsys):
    first, second, whole = Dying(lives=17), Dying(), Dying()
    url = judged_in_part(first, "--both_orders")
    error = capsys.readouterr().err
    assert "503 gone (17 of 24 answers are kept in out/answers.jsonl: the same command" in error
    judge_by(url, "--both_orders", status=2)  # nobody listens
    assert "give another judge_base_url. (17 of 24 answers" in capsys.readouterr().err
    again(url, second, "--both_orders")
    assert "out/answers.jsonl has 17 answers" in capsys.readouterr().out
    again(url, whole, "--both_orders", "--output_dir", "whole")
    assert len(second.answered) == 7
    assert first.answered + second.answered == whole.answered
    (found, samples), (expected, expected_samples) = result(), result("whole")
    assert samples == expected_samples
    assert found["figures"] == expected["figures"]
    assert 0 < found["figures"]["win_rate"] < 1


@pytest.mark.parametrize(
    "argv", [("--judge_prompt", "p.txt"), ("--judge_kwargs", '{"max_tokens": 5}')]
)
def test_another_template_or_request_is_another_question(argv):
    url = judged_in_part(Dying(lives=5))
    Path("p.txt").write_text(DEFAULT + " So?")
    second = Dying()
    again(url, second, *argv)
    assert len(second.answered) == 12


def test_another_text_is_asked_for():
    first, second = Dying(lives=5), Dying()
    url = judged_in_part(first)
    text = Path("a.jsonl").read_text()
    Path("a.jsonl").write_text(text.replace('"xxxxx1"', '"new"'))
    again(url, second)
    assert len(second.answered) == 8
    assert any("new" in pair for pair in second.answered)


def test_answer_that_is_kept_is_read_with_the_marker_of_now():
    url = judged_in_part(Dying(lives=11))
    second = Dying()
    again(url, second, "--judge_marker", "VERDICT:")
    assert len(second.answered) == 1
    found, _ = result()
    assert found["figures"]["no_verdict"] == {"unreadable": 12}


def test_cut_last_line_is_asked_for_again():
    url = judged_in_part(Dying(lives=5))
    kept = Path("out/answers.jsonl")
    kept.write_bytes(kept.read_bytes()[:-3])
    second = Dying()
    again(url, second)
    assert len(second.answered) == 8
    assert Answers(kept).num_found == 12


@pytest.mark.parametrize(
    "line", ['{"question": "q"}', "[" * 100_000, '{"question": "q", "answer": 1}']
)
def test_damaged_line_is_named(line):
    Path("answers.jsonl").write_text(f'{{"question": "q", "answer": "1"}}\n{line}\n')
    with pytest.raises(ValueError, match="line 2: expected an object with 'question' and 'answer'"):
        Answers(Path("answers.jsonl"))


def test_question_asked_twice_has_two_answers():
    for answer in ("0", "1"):
        Answers(Path("answers.jsonl")).add("q", answer)
    answers = Answers(Path("answers.jsonl"))
    assert [answers.take(question) for question in "pqqq"] == [None, "0", "1", None]


def test_answer_is_that_of_one_address_and_model():
    def answer(url, model="some-judge"):
        judge = OpenAIJudge(url, model, answers=Answers(Path("answers.jsonl")))
        return judge(["p"], [("a", "bb")])[0].index

    with serving(longer) as url:
        answer(url)
    assert answer(url) == 1  # nobody listens: it is the one that is kept
    for other in ((url, "other-judge"), (url.replace("127.0.0.1", "localhost"),)):
        with pytest.raises(JudgeError, match="cannot be reached"):
            answer(*other)


def test_refused_question_does_not_stop_a_judge_that_has_answered_others():
    class TooLong(Dying):
        def __call__(self, body, headers, number):
            if "w5 w2" in body["messages"][0]["content"]:
                return 400, {"detail": "too long"}, {}
            return super().__call__(body, headers, number)

    url = judged_in_part(TooLong(lives=5))  # the sixth is not taken, the seventh finds it gone
    again(url, TooLong())
    found, _ = result()
    assert found["figures"]["no_verdict"] == {"refused": 1}
    assert found["figures"]["num_decided"] == 11


def test_interrupt_says_what_is_kept(capsys):
    first, second = Dying(), Dying()
    main_thread = threading.get_ident()

    def interrupting(body, headers, number):
        if number == 5:
            signal.pthread_kill(main_thread, signal.SIGINT)
            time.sleep(0.3)
            return 503, {}, {}
        return first(body, headers, number)

    texts_file("a.jsonl", [f"x{i}" for i in range(12)], rows_file())
    # shells start what runs in the background with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with serving(interrupting) as url:
            judge_by(url, status=130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "5 of 12 answers are kept in out/answers.jsonl" in capsys.readouterr().out
    again(url, second)
    assert len(second.answered) == 7
