"""What a server may do instead of answering, each met over a socket.

Every behaviour ends, and soon, in a verdict, in no verdict with a word for it, or in a JudgeError
that names the judge. `TABLE` says which, where the server has answered one question before and
answers the next: "retried" means that the question was asked again.
"""

from __future__ import annotations

import gzip
import json
import time

import pytest

from rloo_fast.judges import http
from rloo_fast.judges.compare import JudgeError
from rloo_fast.judges.endpoint import OpenAIJudge
from rloo_fast.masking import known
from tests.support.raw_server import chat, drips, raw_serving, reply, says

KEY = "sk-loopback-0123456789-abcdefghij-0123456789-zyxw"
LIMIT_S = 0.4
GOOD = says(reply(chat("0")))
RETRIED, UNREADABLE, NOT_CHAT = "retried", "unreadable", "is not a chat completion"
GONE_DATE = "Wed, 21 Oct 2015 07:28:00 GMT"
cut = reply({"detail": "overloaded"}, 503, length=1000)


def chunked(*sizes_and_data: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(sizes_and_data)


def busy(retry_after: str, status: int = 429):
    return says(reply({"error": {"message": "slow down"}}, status, Retry_After=retry_after))


TABLE = {
    # the connection
    "hangs up": (says(), RETRIED),
    "hangs up in the status line": (says(b"HTTP/1.1 2"), RETRIED),
    "hangs up in the headers": (says(b"HTTP/1.1 200 OK\r\nContent-Le"), RETRIED),
    "hangs up in the body": (says(reply(chat("0"))[:-4]), RETRIED),
    "hangs up in a chunk": (says(chunked(b"40\r\n{")), RETRIED),
    "no last chunk": (says(chunked(b"2\r\n{}\r\n")), RETRIED),
    "a chunk size that is none": (says(chunked(b"zz\r\n{}\r\n")), RETRIED),
    "no HTTP": (says(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), RETRIED),
    "a length that is none": (says(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}"), RETRIED),
    "a negative length": (says(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}"), RETRIED),
    "headers without end": (says(b"HTTP/1.1 200 OK\r\n", b"X: yyyy\r\n" * 30_000), RETRIED),
    "one endless header": (says(b"HTTP/1.1 200 OK\r\nX: ", b"y" * 300_000), RETRIED),
    "closes after each answer": (says(reply(chat("0"), Connection="keep-alive")), "0"),
    # time
    "silence": (says(2.0), RETRIED),
    "a late body": (says(reply(chat("0"))[:-3], 2.0), RETRIED),
    "a dripping head": (drips(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100), RETRIED),
    "a dripping body": (drips(reply(chat("0" * 100))), RETRIED),
    "informational answers": (says(*([b"HTTP/1.1 100 Continue\r\n\r\n", 0.02] * 60)), RETRIED),
    # statuses
    **{f"{status}": (says(reply({}, status)), RETRIED)
       for status in (408, 409, 425, 429, 500, 502, 503, 504, 529)},
    **{f"{status}": (says(reply({"detail": "no"}, status)), f"refused: {status} no")
       for status in (401, 402, 403, 404, 405, 451)},
    **{f"{status}": (says(reply({"detail": "no"}, status)), "refused")
       for status in (400, 413, 422)},
    "204": (says(reply(b"", 204)), "refused: 204"),
    "307": (says(reply(b"", 307, Location="http://127.0.0.1:1/")), "refused: 307 .*redirect"),
    "a 503 that is cut": (says(cut), RETRIED),
    "a 503 that is late": (says(cut, 2.0), RETRIED),
    "a 503 that is compressed": (says(reply(gzip.compress(b"x"), 503, Content_Encoding="gzip")),
                                 RETRIED),
    "a 503 without end": (says(b"HTTP/1.1 503 No\r\n\r\n", b"x" * 10**6), RETRIED),
    "a 400 that is cut": (says(reply({"detail": "no"}, 400, length=1000)), "refused"),
    # Retry-After
    **{f"Retry-After {text!r}": (busy(text), RETRIED)
       for text in ("0", "0.01", "-1", "soon", "nan", "-inf", "", GONE_DATE, "Mon, 99 Foo 2015",
                    "Mon, 01 Jan 99999 00:00:00 GMT", "1,2", "\xb2")},
    # bodies
    "HTML": (says(reply(b"<html>Welcome</html>")), NOT_CHAT),
    "nothing": (says(reply(b"")), NOT_CHAT),
    "no UTF-8": (says(reply(b'{"choices": "\xff\xfe"}')), NOT_CHAT),
    "JSON without end": (says(reply(b'{"choices": [')), NOT_CHAT),
    "a hundred thousand brackets": (says(reply(b"[" * 100_000)), NOT_CHAT),
    "a number of a million digits": (says(reply(b"1" * 10**6)), NOT_CHAT),
    "too long a body": (says(reply(b"", length=10**9)), "longer than"),
    "too many chunks": (says(chunked(*[b"10000\r\n", b" " * 2**16, b"\r\n"] * 17)), "longer than"),
    "a compressed body": (says(reply(gzip.compress(b" " * 10**8), Content_Encoding="gzip")),
                          "compressed"),
    "events": (says(reply(b'data: {"choices": []}\n\n')), NOT_CHAT),
    "an error as 200": (says(reply({"error": {"code": 502, "message": "upstream"}})), RETRIED),
    "a refusal as 200": (says(reply({"error": {"code": 403, "message": "no"}})), "refused: 403 no"),
    "an error in words as 200": (says(reply({"error": "model is loading"})), NOT_CHAT),
    "null": (says(reply(None)), NOT_CHAT),
    "a list": (says(reply([1])), NOT_CHAT),
    "no choices": (says(reply({"choices": []})), NOT_CHAT),
    "choices of null": (says(reply({"choices": None})), NOT_CHAT),
    "a message of null": (says(reply({"choices": [{"message": None}]})), NOT_CHAT),
    "a message of text": (says(reply({"choices": [{"message": "0"}]})), NOT_CHAT),
    "an old completion": (says(reply({"choices": [{"text": "0"}]})), NOT_CHAT),
    "content of a number": (says(reply(chat(0))), NOT_CHAT),
    "content of a dict": (says(reply(chat({"text": "0"}))), NOT_CHAT),
    "a list of numbers": (says(reply(chat([0]))), NOT_CHAT),
    # what was said
    "content of null": (says(reply(chat(None))), UNREADABLE),
    "a refusal": (says(reply(chat(None, refusal="I cannot."))), UNREADABLE),
    "empty": (says(reply(chat(""))), UNREADABLE),
    "parts": (says(reply(chat([{"type": "text", "text": "0"}]))), "0"),
    "several parts": (says(reply(chat([{"type": "thinking"}, {"type": "text", "text": "0"}]))),
                      "0"),
    "no parts": (says(reply(chat([]))), UNREADABLE),
    "parts without text": (says(reply(chat([{"type": "image_url"}]))), UNREADABLE),
    "both": (says(reply(chat("0 or 1"))), UNREADABLE),
    "a two": (says(reply(chat("2"))), UNREADABLE),
    "other digits": (says(reply(chat("٠"))), UNREADABLE),
    "half a letter": (says(reply(chat("\ud83d"))), UNREADABLE),
    "decorated": (says(reply(chat(' **"0".** \n'))), "0"),
    "a zero byte": (says(reply(chat("0\0"))), UNREADABLE),
    "a long text": (says(reply(chat("0" * 10**5))), UNREADABLE),
    "chunks": (says(chunked(b"4c\r\n", json.dumps(chat("0")).ljust(76).encode(),
                            b"\r\n0\r\n\r\n")), "0"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setattr(known, "_met", {})
    monkeypatch.setattr(http, "LARGEST_BYTES", 2**20)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def judge_at(url, **options):
    return OpenAIJudge(url, "m", **{"timeout_s": LIMIT_S, "pause_s": 0.001, "retries": 1} | options)


@pytest.mark.parametrize(("behaviour", "outcome"), TABLE.values(), ids=TABLE)
def test_once(behaviour, outcome):
    begin = time.monotonic()
    with raw_serving(lambda n: behaviour if n == 1 else GOOD) as (url, requests):
        judge = judge_at(url, concurrency=1)
        if outcome in (RETRIED, UNREADABLE, "refused", "0"):
            first, verdict = judge(["p"] * 2, [("a", "b")] * 2)
            assert first == (0, "", "0")
            assert len(requests) == 2 + (outcome == RETRIED)
            assert (verdict.why or str(verdict.index)) == outcome.replace(RETRIED, "0")
        else:
            with pytest.raises(JudgeError, match=f"the judge at {url}.*{outcome}"):
                judge(["p"] * 2, [("a", "b")] * 2)
            assert len(requests) == 2
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize(("behaviour", "outcome"), TABLE.values(), ids=TABLE)
def test_always(behaviour, outcome):
    """A server that never does anything else."""
    begin = time.monotonic()
    with raw_serving(lambda n: behaviour) as (url, requests):
        if outcome in (UNREADABLE, "0"):
            (verdict,) = judge_at(url)(["p"], [("a", "b")])
            assert (verdict.why or str(verdict.index)) == outcome
        else:
            with pytest.raises(JudgeError, match=f"the judge at {url}") as caught:
                judge_at(url)(["p"], [("a", "b")])
            assert len(str(caught.value)) < 600
            assert len(requests) == 1 + (outcome == RETRIED)
    assert time.monotonic() - begin < 3


# --- a key that a server repeats

LONG = "x" * 260  # the message is cut behind 300 characters, which would cut the key

REPEATED = {
    "error": says(reply({"error": {"message": f"bad key {KEY}"}}, 401)),
    "cut": says(reply({"error": {"message": f"{LONG} {KEY}"}}, 401)),
    "cut, busy": says(reply({"error": {"message": f"{LONG} {KEY}"}}, 503)),
    "in JSON": says(reply({"error": {"given": {"authorization": f"Bearer {KEY}"}}}, 401)),
    "text": says(reply(f"Authorization: Bearer {KEY}".encode(), 403)),
    "cut body": says(reply(f"{'x' * 170}{KEY}".encode())),
    "reason": says(b"HTTP/1.1 401 " + KEY.encode() + b"\r\nContent-Length: 0\r\n\r\n"),
    "half": says(reply({"detail": f"key {KEY[:30]} is unknown"}, 401)),
    "redirect": says(reply(b"", 302, Location=f"http://127.0.0.1:1/?key={KEY}")),
    "no HTTP": says(KEY.encode() + b"\r\n\r\n"),
}


@pytest.mark.parametrize("behaviour", REPEATED.values(), ids=REPEATED)
def test_a_repeated_key_is_in_no_error(behaviour):
    with raw_serving(lambda n: behaviour) as (url, _), pytest.raises(JudgeError) as caught:
        judge_at(url)(["p"], [("a", "b")])
    error = caught.value
    while error is not None:
        assert not any(KEY[at : at + 8] in str(error) for at in range(3, len(KEY) - 8)), error
        error = error.__cause__


def test_a_repeated_key_is_in_no_answer():
    with raw_serving(lambda n: says(reply(chat(f"your key is {KEY}")))) as (url, _):
        (verdict,) = judge_at(url)(["p"], [("a", "b")])
    assert verdict.answer == "your key is <masked>"


@pytest.mark.parametrize("key", ["0", "1", "EMPTY"])
def test_a_key_that_is_none_takes_no_verdict_away(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with raw_serving(lambda n: GOOD) as (url, requests):
        (verdict,) = judge_at(url)(["p"], [("a", "b")])
    assert verdict == (0, "", "0")
    assert f"authorization: bearer {key}\r\n".lower().encode() in requests[0].lower()


@pytest.mark.parametrize("bad", ["\n", "\r\n", "\t", " ", "\x00", "é", "\u2028"])
def test_a_key_that_no_header_takes_is_refused_before_anything_is_asked(bad, monkeypatch):
    if bad == "\x00":
        monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": KEY[:20] + bad + KEY[20:]})
    else:
        monkeypatch.setenv("OPENAI_API_KEY", KEY[:20] + bad + KEY[20:])
    with pytest.raises(ValueError, match=r"OPENAI_API_KEY has .* at place 21 of ") as caught:
        judge_at("http://127.0.0.1:1/v1")
    assert not any(part in str(caught.value) for part in (KEY[:8], KEY[-8:]))


# --- limits


def test_the_time_is_for_the_whole_answer():
    """An answer of one byte every 20 ms arrives, byte by byte, and is not waited for."""
    begin = time.monotonic()
    dripping = drips(reply(chat("0" * 10_000)))
    with (
        raw_serving(lambda n: dripping) as (url, _),
        pytest.raises(JudgeError, match=r"no whole answer within 0\.4 s"),
    ):
        judge_at(url, retries=0)(["p"], [("a", "b")])
    assert time.monotonic() - begin < 2 * LIMIT_S


def test_the_time_is_for_the_name_too(monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *a, **k: time.sleep(1.0) or [])
    begin = time.monotonic()
    with pytest.raises(JudgeError, match="no whole answer within"):
        judge_at("http://judge.invalid/v1", retries=0)(["p"], [("a", "b")])
    assert time.monotonic() - begin < 0.9


def test_the_time_is_for_tls_too():
    with raw_serving(lambda n: GOOD) as (url, _):
        begin = time.monotonic()
        with pytest.raises(JudgeError, match="judge"):
            judge_at(url.replace("http:", "https:"), retries=0)(["p"], [("a", "b")])
    assert time.monotonic() - begin < 2 * LIMIT_S + 1


@pytest.mark.parametrize(
    "proxy", ["nonsense", "ftp://me:pw-12345678@h:1", "http://me:pw-12345678@127.0.0.1:1"]
)
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(proxy, monkeypatch):
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(JudgeError, match="judge") as caught:
        judge_at("http://judge.invalid/v1", retries=0)(["p"], [("a", "b")])
    assert "pw-12345678" not in str(caught.value)


def test_a_proxy_is_asked(monkeypatch):
    with raw_serving(lambda n: GOOD) as (url, requests):
        monkeypatch.setenv("http_proxy", url.removesuffix("/v1"))
        assert judge_at("http://judge.invalid/v1")(["p"], [("a", "b")])[0].index == 0
    assert requests[0].startswith(b"POST http://judge.invalid/v1/chat/completions ")


def test_a_judge_is_asked_from_a_running_loop():
    """As in a notebook."""
    import asyncio

    async def cell(judge):
        return judge(["p"], [("a", "b")])

    with raw_serving(lambda n: GOOD) as (url, _):
        assert asyncio.run(cell(judge_at(url)))[0].index == 0
