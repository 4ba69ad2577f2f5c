"""What a rollout server answers, taken apart before anything is trained on it."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from rloo_fast.records import Sampling
from rloo_fast.rollout.engine import EngineError
from rloo_fast.rollout.vllm import transport as vllm_transport
from rloo_fast.rollout.vllm.answers import Completion, OddAnswer, most_bytes, read_completion
from rloo_fast.rollout.vllm.server import VLLMServer
from rloo_fast.rollout.vllm.transport import Endpoint, Refused, ServerGone

PROMPT = [4, 5]
DEEP = "[" * 100_000


def choice(**changes):
    plain = {"index": 0, "text": "a", "finish_reason": "stop", "token_ids": [7, 1]}
    plain |= {"logprobs": {"token_logprobs": [-0.5, -0.25]}, "prompt_token_ids": PROMPT}
    return {name: value for name, value in (plain | changes).items() if value is not ...}


def answer(**changes):
    return {"id": "cmpl-r", "choices": [choice(**changes)]}


def read(said):
    return read_completion(said, request_id="r", prompt_ids=PROMPT, max_tokens=3, vocab_size=10)


def test_a_completion_as_vllm_sends_it():
    assert read(answer()) == ([7, 1], [-0.5, -0.25], "stop")
    rounded = answer(logprobs={"token_logprobs": [1e-6, 0]}, finish_reason="repetition")
    assert read(rounded) == ([7, 1], [1e-6, 0.0], "length")


def logps(*values):
    return {"logprobs": {"token_logprobs": list(values)}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"token_ids": [7, 10]},
            r"token_ids\[1\] must be an id of the model's 10 tokens, and is 10",
        ),
        ({"token_ids": [7, -1]}, r"token_ids\[1\] .* is -1"),
        ({"token_ids": [7, True]}, "is True"),
        ({"token_ids": [7, 1.0]}, r"is 1\.0"),
        ({"token_ids": [7, "1"]}, "is '1'"),
        ({"token_ids": [7, None]}, "is None"),
        ({"token_ids": [7, [1]]}, r"is \[1\]"),
        ({"token_ids": [7, 10**300]}, r"is 1000.*\.\.\."),
        ({"token_ids": []}, "1 to 3 tokens, and is 0 of them"),
        ({"token_ids": [1] * 4}, "1 to 3 tokens, and is 4 of them"),
        ({"token_ids": ...}, "1 to 3 tokens, and is None"),
        ({"token_ids": "71"}, "and is '71'"),
        ({"token_ids": {"0": 7, "1": 1}}, "token_ids must be a list"),
        (logps(-0.5), "list of 2, one per token, and is 1"),
        (logps(-0.5, -0.5, -0.5), "and is 3"),
        (logps(-0.5, None), r"token_logprobs\[1\] must be the logarithm .* is None"),
        (logps(-0.5, math.nan), "is nan"),
        (logps(-0.5, math.inf), "is inf"),
        (logps(-0.5, -math.inf), "is -inf"),
        (logps(-0.5, -(10**400)), "is -1000"),
        (logps(-0.5, 0.01), r"is 0\.01"),
        (logps(-0.5, "-0.5"), "is '-0.5'"),
        (logps(-0.5, False), "is False"),
        ({"logprobs": None}, "one per token, and is None"),
        ({"logprobs": ...}, "one per token, and is None"),
        ({"logprobs": {}}, "one per token, and is None"),
        ({"finish_reason": ...}, r"finish_reason must be one of \['length'"),
        ({"finish_reason": ["stop"]}, r"is \['stop'\]"),
        ({"prompt_token_ids": [5, 4]}, r"is for the prompt \[5, 4\], and \[4, 5\] was sent"),
        ({"prompt_token_ids": ...}, "is for the prompt None"),
    ],
)
def test_what_is_no_completion_is_named(changes, said):
    with pytest.raises(OddAnswer, match=said):
        read(answer(**changes))


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({}, "for request None, and 'cmpl-r' was sent"),
        ({"id": "cmpl-s", "choices": [choice()]}, "for request 'cmpl-s'"),  # swapped
        ({"id": ["cmpl-r"], "choices": [choice()]}, "for request"),
        ({"id": "cmpl-r"}, "one completion, and is None"),
        ({"id": "cmpl-r", "choices": []}, r"one completion, and is \[\]"),
        ({"id": "cmpl-r", "choices": [choice()] * 2}, "one completion"),
        ({"id": "cmpl-r", "choices": {"0": choice()}}, "one completion"),
        ({"id": "cmpl-r", "choices": [[]]}, "one completion"),
    ],
)
def test_an_answer_to_something_else_is_named(said, wrong):
    with pytest.raises(OddAnswer, match=wrong):
        read(said)


@pytest.mark.parametrize("reason", ["abort", "error", "", "STOP"])
def test_a_completion_that_failed_is_none(reason):
    with pytest.raises(EngineError, match="finish reason"):
        read(answer(finish_reason=reason))


# A hostile server


@contextmanager
def server(*parts: bytes, pause_s: float = 0.0):
    """The base URL of one that sends these parts to each request."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=speak, args=[client], daemon=True).start()

    def speak(client):
        with client:
            try:
                client.recv(65536)
                for part in parts:
                    client.sendall(part)
                    time.sleep(pause_s)
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):  # or what was not read resets the connection
                    pass
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def http(body: str, status: int = 200, headers: str = "") -> bytes:
    raw = body.encode("utf-8", "surrogateescape")
    return f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("<html>", "no JSON"),
        ('{"weight_version": ', "no JSON"),
        ("\udcff", "no JSON"),
        (DEEP, "no JSON"),
        ('{"a":' * 50_000, "no JSON"),
        ('{"weight_version": NaN}', "NaN is no JSON"),
        ('{"weight_version": -Infinity}', "-Infinity is no JSON"),
        ("9" * 5000, "no JSON"),
        ("[]", r"no JSON object, but \[\]"),
        ("null", "no JSON object, but null"),
        ("{}", "weight_version must be of type str, and is None"),
        ("", "weight_version must be of type str, and is None"),
        ('{"weight_version": 1e999}', "is inf"),
        ('{"weight_version": true}', "is True"),
        ('{"weight_version": {"a": "\\u001b[31m\\r\\n"}}', "is {'a'"),
    ],
)
def test_an_answer_that_vllm_does_not_give_names_the_server(body, said):
    with server(http(body)) as url, pytest.raises(EngineError, match=said) as caught:
        Endpoint(url, 5).value("/weight_info", "weight_version", str)
    message = str(caught.value)
    assert message.startswith(f"the server at {url} gave an answer to /weight_info that vLLM")
    assert message.isprintable()
    assert len(message) < 900


def test_an_answer_larger_than_what_was_asked_for_is_not_read():
    with server(http(" " * 2000)) as url, pytest.raises(EngineError, match="more than 1000 bytes"):
        Endpoint(url, 5).ask("/x", {}, most_bytes=1000)
    endless = [b"HTTP/1.1 200 OK\r\n\r\n", *[b" " * 2**20] * 30]  # no length given
    with server(*endless) as url, pytest.raises(EngineError, match="more than 16777216 bytes"):
        Endpoint(url, 5).get("/x")


def test_the_size_of_an_answer_follows_from_what_was_asked_for():
    assert most_bytes(100, 50) == 65536 + 4096 * 150


@pytest.mark.parametrize(
    "parts",
    [
        [b"H"] * 50,
        [b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 50],
        [b"HTTP/1.1 100 Continue\r\n\r\n"] * 50,
        [b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n", *[b" "] * 50],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 50],
    ],
    ids=["status", "headers", "continue", "body", "chunks"],
)
def test_a_server_that_drips_is_hung_up_on(parts, monkeypatch):
    monkeypatch.setattr(vllm_transport, "BODY_S", 0.3)
    start = time.monotonic()
    with server(*parts, pause_s=0.1) as url, pytest.raises(ServerGone, match=r"after 0\.3 s"):
        Endpoint(url, 5).get("/health", 0.3)
    assert time.monotonic() - start < 3


def test_a_server_that_never_answers_is_not_waited_for_longer_than_said():
    with server(pause_s=0) as url:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            start = time.monotonic()
            with pytest.raises(ConnectionError, match=r"within 0\.2 s"):
                VLLMServer(silent_url, timeout_s=0.2)
            assert time.monotonic() - start < 5
        with pytest.raises(ServerGone):
            Endpoint(url, 5).get("/health")


def test_an_answer_cut_short_is_none():
    cut = b'HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"a": 1}'
    with server(cut) as url, pytest.raises(ServerGone, match="42 bytes of its answer are missing"):
        Endpoint(url, 5).get("/x")


def test_no_redirect_and_no_proxy_gets_the_key(monkeypatch):
    seen = []
    with server(http("{}")) as elsewhere:
        monkeypatch.setenv("http_proxy", elsewhere)
        monkeypatch.setattr(socket.socket, "connect", spied(socket.socket.connect, seen))
        with (
            server(http("", 307, f"Location: {elsewhere}/x\r\n")) as url,
            pytest.raises(Refused, match="no reason given"),
        ):
            Endpoint(url, 5, "the-key").post("/x")
    assert [port for _, port in seen] == [int(url.rpartition(":")[2])]


def spied(connect, seen):
    def spy(self, address):
        seen.append(address)
        return connect(self, address)

    return spy


def test_what_a_server_repeats_is_shown_without_the_key_and_cut_after_that():
    key = "the-key-of-the-server"
    said = json.dumps({"error": {"message": "x" * 490 + key + "\n\x1b[31m" + "y" * 10**6}})
    with server(http(said, 500)) as url, pytest.raises(Refused) as caught:
        Endpoint(url, 5, key).post("/x")
    message = str(caught.value)
    assert "the-k" not in message.replace("<key>", "")
    assert message.isprintable()
    assert len(message) < 510


def test_a_request_is_sent_once_and_its_failure_is_reported_with_the_server(monkeypatch):
    asked = []

    def ask(self, path, fields, *, most_bytes):
        asked.append(fields["request_id"])
        said = answer(prompt_token_ids=fields["prompt"], token_ids=[7, 99])
        return said | {"id": f"cmpl-{fields['request_id']}"}

    monkeypatch.setattr(Endpoint, "ask", ask)
    engine = VLLMServer.__new__(VLLMServer)
    engine._server, engine._vocab_size = Endpoint("http://gpu7:8000", 5), 10
    with pytest.raises(EngineError, match=r"server at http://gpu7:8000 .*token_ids\[1\].* is 99"):
        engine._complete([6], 3, {"max_tokens": 4})
    with pytest.raises(EngineError):
        engine._complete([6], 3, {"max_tokens": 4})
    assert len(set(asked)) == len(asked) == 2


def test_a_prompt_is_asked_for_once_though_the_others_fail(monkeypatch):
    asked = []

    def complete(self, ids, seed, fields):
        asked.append(ids)
        if ids == [5]:
            raise EngineError("odd")
        return Completion([1], [-0.5], "stop")

    monkeypatch.setattr(VLLMServer, "_complete", complete)
    monkeypatch.setattr(VLLMServer, "_check_label", lambda self: None)
    engine = VLLMServer.__new__(VLLMServer)
    engine._server, engine._num_requests = Endpoint("http://gpu7:8000", 5), 1
    engine._fields, engine._max_model_len, engine._sends_adapter = set(), 100, False
    sampling = Sampling(1.0, 1.0, 0, None, 1.0, 4, (1,))
    with pytest.raises(EngineError, match="odd"):
        engine._generate([[4], [5], [6]], sampling, [0, 1, 2], lambda index, ids: None)
    assert len(asked) == len(set(map(tuple, asked)))
