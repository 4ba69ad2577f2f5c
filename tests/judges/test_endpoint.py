"""A judge behind an address: requests, retries, refusals, and a key that stays secret."""

from __future__ import annotations

import threading
import time

import pytest

from rloo_fast.judges.compare import JudgeError
from rloo_fast.judges.endpoint import OpenAIJudge
from tests.support.judge_runs import KEY, longer, serving


def ask(rule, num_pairs=1, **options):
    """Verdicts of an OpenAIJudge over a server with this rule, and the questions it was asked."""
    asked = []

    def noting(body, headers, number):
        asked.append((body, dict(headers)))
        return rule(body, headers, number)

    with serving(noting) as url:
        judge = OpenAIJudge(url, "some-judge", **{"pause_s": 0.01, **options})
        return judge(["p"] * num_pairs, [("aa", "b")] * num_pairs), asked


def test_request_has_the_key_the_model_and_the_extra_fields(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    _, [(body, headers)] = ask(longer, request={"temperature": None, "max_tokens": 3})
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body.keys() == {"model", "messages", "max_tokens"}


def test_without_a_key_no_header_is_sent():
    _, [(body, headers)] = ask(longer)
    assert "Authorization" not in headers
    assert body["temperature"] == 0


def test_busy_server_is_asked_again():
    def busy_at_first(body, headers, number):
        return (429 if number < 2 else 503, {}, {}) if number < 3 else longer(body, headers, number)

    verdicts, asked = ask(busy_at_first)
    assert verdicts[0].index == 0
    assert len(asked) == 4


def test_retry_after_is_obeyed():
    def wait(body, headers, number):
        return longer(body, headers, number) if number else (429, {}, {"Retry-After": "0.4"})

    started = time.monotonic()
    ask(wait)
    assert time.monotonic() - started >= 0.4


def test_server_that_stays_busy_is_an_error_with_its_words():
    error = {"error": {"message": "quota exceeded"}}
    with pytest.raises(JudgeError, match=r"no answer in 3 attempts: 429 quota exceeded"):
        ask(lambda *_: (429, error, {}), retries=2)


def test_slow_answer_is_asked_for_again():
    again = threading.Event()

    def slow(body, headers, number):
        again.set() if number else again.wait(60)
        return longer(body, headers, number)

    verdicts, asked = ask(slow, timeout_s=2.0)
    assert verdicts[0].index == 0
    assert len(asked) == 2


def test_refused_key_is_an_error_at_once_and_is_not_repeated(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    error = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    with pytest.raises(JudgeError, match="refused: 401 Incorrect API key") as caught:
        ask(lambda *_: (401, error, {}), num_pairs=5)
    assert KEY not in str(caught.value)


def test_question_that_is_not_taken_is_no_verdict():
    def too_long(body, headers, number):
        return (400, {"detail": "too long"}, {}) if number == 2 else longer(body, headers, number)

    verdicts, _ = ask(too_long, num_pairs=4, concurrency=1)
    assert [v.index for v in verdicts] == [0, 0, None, 0]
    assert verdicts[2][1:] == ("refused", "400 too long")


def test_unreadable_answers_are_counted_and_kept():
    def rambling(body, headers, number):
        return (200, "Both are fine.", {}) if number % 2 else longer(body, headers, number)

    verdicts, _ = ask(rambling, num_pairs=6, concurrency=1)
    assert [v.index for v in verdicts] == [0, None] * 3
    assert verdicts[1] == (None, "unreadable", "Both are fine.")


def test_answer_that_is_no_chat_completion_is_an_error():
    with pytest.raises(JudgeError, match=r"not a chat completion: '\{\"hello\": 1\}'"):
        ask(lambda *_: (200, {"hello": 1}, {}))


def test_redirect_does_not_take_the_key_along(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    elsewhere = []

    def note(body, headers, number):
        elsewhere.append(headers)
        return longer(body, headers, number)

    with serving(note) as other:
        target = {"Location": f"{other}/chat/completions"}
        with pytest.raises(JudgeError, match="refused: 302"):
            ask(lambda *_: (302, {}, target))
    assert not elsewhere


def test_verdicts_keep_the_order_of_the_pairs_with_many_at_a_time():
    def uneven(body, headers, number):
        time.sleep(0.02 * (number % 3))
        return longer(body, headers, number)

    pairs = [("xx", "x") if row % 3 else ("x", "xx") for row in range(30)]
    with serving(uneven) as url:
        verdicts = OpenAIJudge(url, "some-judge", concurrency=8)(["p"] * 30, pairs)
    assert [v.index for v in verdicts] == [int(row % 3 == 0) for row in range(30)]


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1", "https://user:secret@host/v1", "https://host/v1?key=secret",
        "https://:secret@host/v1", "user:secret@host:80/v1", "ftp://secret@host/v1",
        "https://secret@host/v1", "http://host:99999/v1", "http://host:port/v1", "http://[::1/v1",
        "http:///v1", "", "http://host:0/v1",
    ],
)  # fmt: skip
def test_address_without_scheme_or_with_a_secret_is_refused(url):
    with pytest.raises(ValueError, match="judge_base_url") as caught:
        OpenAIJudge(url, "m")
    assert "secret" not in str(caught.value)
