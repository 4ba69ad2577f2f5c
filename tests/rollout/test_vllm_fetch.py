"""Weights over HTTP, both sides of it: what a server opens, and what a trainer hands out."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from rloo_fast.rollout.vllm import fetch as vllm_fetch
from rloo_fast.rollout.vllm import http as vllm_http
from rloo_fast.rollout.vllm import offers as vllm_offers
from rloo_fast.rollout.vllm.fetch import SMALL_BYTES, NotFetched, fetch, most_bytes, read_hosts
from rloo_fast.rollout.vllm.http import NOT_FETCHED
from rloo_fast.rollout.vllm.offers import BucketServer
from rloo_fast.rollout.vllm.pack import pack
from tests.support.offered import offered

TOKEN = "t" * 43
ROOM = 2**20


@contextmanager
def answering(*parts: bytes, pause_s: float = 0.0, host: str = "127.0.0.1"):
    """A server that sends these parts to each client; (port, request lines)."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else 2)
    asked: list[bytes] = []

    def serve():
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                try:
                    asked.append(client.recv(65536).split(b"\r\n")[0])
                    for part in parts:
                        client.sendall(part)
                        time.sleep(pause_s)
                except OSError:
                    pass

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1], asked
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"


def refused(url, hosts="", room=ROOM) -> None:
    with pytest.raises(NotFetched) as caught:
        fetch(url, hosts, room)
    assert str(caught.value) == NOT_FETCHED
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "url",
    [
        f"http://127.0.0.1:PORT/{TOKEN}/0",
        f"http://[::ffff:127.0.0.1]:PORT/{TOKEN}/0",
    ],
)
def test_a_bucket_on_this_machine_is_fetched(url):
    with answering(OK, b"ab") as (port, asked):
        assert fetch(url.replace("PORT", str(port)), "", ROOM) == (TOKEN, b"ab")
    assert asked == [b"GET /%s/0 HTTP/1.1" % TOKEN.encode()]


@pytest.mark.parametrize(
    "url",
    [
        "", None, 5, ["x"], {"url": "x"}, b"http://127.0.0.1:PORT/" + TOKEN.encode() + b"/0",
        "file:///etc/passwd", "file:///dev/zero", "/etc/passwd", "data:,x", "ftp://127.0.0.1:PORT/x",
        "unix:///run/x", "gopher://127.0.0.1:PORT/x", "jar:http://127.0.0.1:PORT/x",
        "http://127.0.0.1:PORT/", "http://127.0.0.1:PORT/admin?delete=all",
        f"https://127.0.0.1:PORT/{TOKEN}/0", f"HTTP://127.0.0.1:PORT/{TOKEN}/0",
        f"http://127.0.0.1/{TOKEN}/0", f"http://127.0.0.1:22/{TOKEN}/0",
        f"http://127.0.0.1:1023/{TOKEN}/0", f"http://127.0.0.1:99999/{TOKEN}/0",
        f"http://127.0.0.1:٤٤٤٤/{TOKEN}/0", f"http://127.0.0.1:PORT/{TOKEN}/../0",
        f"http://127.0.0.1:PORT/{TOKEN}/0?x", f"http://127.0.0.1:PORT/{TOKEN}/0#x",
        f"http://127.0.0.1:PORT/{TOKEN}/0\n", f"http://127.0.0.1:PORT/{TOKEN}/0 HTTP/1.1\r\nX: y",
        f"http://127.0.0.1:PORT/{TOKEN}/0\x00", f"http://127.0.0.1:PORT/{TOKEN}%2f0",
        f"http://user:pw@127.0.0.1:PORT/{TOKEN}/0", f"http://10.0.0.7@127.0.0.1:PORT/{TOKEN}/0",
        f"http://10.0.0.7\\@127.0.0.1:PORT/{TOKEN}/0", f"http://localhost:PORT/{TOKEN}/0",
        f"http://2130706433:PORT/{TOKEN}/0", f"http://0x7f000001:PORT/{TOKEN}/0",
        f"http://127.1:PORT/{TOKEN}/0", f"http://0177.0.0.1:PORT/{TOKEN}/0",
        f"http://127.0.0.01:PORT/{TOKEN}/0", f"http://127.0.0.1.:PORT/{TOKEN}/0",
        f"http://①27.0.0.1:PORT/{TOKEN}/0", f"http://%31%32%37.0.0.1:PORT/{TOKEN}/0",
        f"http://0.0.0.0:PORT/{TOKEN}/0", f"http://[::]:PORT/{TOKEN}/0",
        f"http://[::ffff:0.0.0.0]:PORT/{TOKEN}/0", f"http://[fe80::1%lo]:PORT/{TOKEN}/0",
        f"http://[::1:PORT/{TOKEN}/0", f"http://8.8.8.8:PORT/{TOKEN}/0",
        f"http://169.254.169.254:PORT/{TOKEN}/0", f"http://224.0.0.1:PORT/{TOKEN}/0",
        f"http://255.255.255.255:PORT/{TOKEN}/0",
    ],
)  # fmt: skip
def test_nothing_else_is_opened(url):
    with answering(OK, b"ab") as (port, asked):
        refused(url.replace("PORT", str(port)) if isinstance(url, str) else url)
    assert asked == []


def test_only_the_hosts_that_the_server_was_started_for():
    with answering(OK, b"ab") as (port, asked):
        url = f"http://127.0.0.1:{port}/{TOKEN}/0"
        refused(url, "10.0.0.7, 10.1.0.0/16")  # this machine is then no exception
        assert asked == []
        for hosts in ("10.0.0.7,127.0.0.1", "127.0.0.0/8", "localhost"):
            assert fetch(url, hosts, ROOM) == (TOKEN, b"ab")


def test_a_name_is_looked_up_for_comparison_alone(monkeypatch):
    """DNS that answers another address later leads nowhere: an address is connected to."""
    answers = iter(["127.0.0.1", "8.8.8.8"])
    monkeypatch.setattr(vllm_fetch, "_addresses", lambda name: [next(answers)])
    with answering(OK, b"ab") as (port, _):
        assert fetch(f"http://127.0.0.1:{port}/{TOKEN}/0", "trainer", ROOM) == (TOKEN, b"ab")
        refused(f"http://127.0.0.1:{port}/{TOKEN}/0", "trainer")


@pytest.mark.parametrize(
    "hosts", ["http://a", "a:80", "a/b", "1.2.3", "1.2.3.4:5", "-a", "a b", "*", "::1]", "a@b"]
)
def test_hosts_that_are_none_are_refused_when_the_server_starts(hosts):
    with pytest.raises(ValueError, match="RLOO_FAST_TRAINER_HOST takes host names"):
        read_hosts(hosts)


def test_proxies_of_the_environment_are_not_asked(monkeypatch):
    with answering(OK, b"no") as (proxy, through), answering(OK, b"ab") as (port, _):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy}")
        assert fetch(f"http://127.0.0.1:{port}/{TOKEN}/0", "", ROOM) == (TOKEN, b"ab")
    assert through == []


def test_a_redirect_is_not_followed():
    with answering(OK, b"ab") as (port, elsewhere):
        to = f"Location: http://127.0.0.1:{port}/{TOKEN}/0\r\nContent-Length: 0\r\n\r\n"
        for status in (301, 302, 303, 307, 308):
            with answering(f"HTTP/1.1 {status} Go\r\n{to}".encode()) as (first, _):
                refused(f"http://127.0.0.1:{first}/{TOKEN}/0")
    assert elsewhere == []


@pytest.mark.parametrize(
    "parts",
    [
        [b""],
        [b"SSH-2.0-OpenSSH_9\r\n"],
        [b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nab"],
        [b"HTTP/1.1 206 Part\r\nContent-Length: 2\r\n\r\nab"],
        [b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 100],  # no length
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab"],  # cut
        [b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nab"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\nab"],  # more than the model has
        [b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000],
        [b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200],
    ],
)
def test_an_answer_that_is_no_bucket_is_refused_in_the_same_words(parts):
    with answering(*parts) as (port, _):
        refused(f"http://127.0.0.1:{port}/{TOKEN}/0")


@pytest.mark.parametrize(
    "parts",
    [
        [b"H"] * 100,
        [b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 90],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n", *[b"x"] * 90],
    ],
    ids=["status", "headers", "body"],
)
def test_a_sender_that_drips_is_hung_up_on(parts, monkeypatch):
    monkeypatch.setattr(vllm_fetch, "patience_s", lambda nbytes: 0.3)
    with answering(*parts, pause_s=0.1) as (port, _):
        start = time.monotonic()
        refused(f"http://127.0.0.1:{port}/{TOKEN}/0")
    assert time.monotonic() - start < 3


def test_patience_grows_with_the_bytes():
    assert vllm_http.patience_s(0) == 60
    assert vllm_http.patience_s(2**33) == 60 + 1024


def test_the_most_bytes_of_an_update_follow_from_the_model():
    model = nn.Linear(10, 20, bias=False).bfloat16()
    assert most_bytes(model, 1) == 800 + SMALL_BYTES
    assert most_bytes(model, 8) == 6400 + SMALL_BYTES  # each worker has a share of it


# The trainer's side


@pytest.fixture(scope="module")
def shelf():
    server = BucketServer("127.0.0.1")
    yield server
    server.close()


def connected(url: str) -> socket.socket:
    port = int(url.split(":")[2].split("/")[0])
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def path_of(url: str) -> str:
    return "/" + url.split("/", 3)[3]


def exchange(url: str, request: bytes) -> bytes:
    with connected(url) as client:
        client.sendall(request)
        answer = b""
        while part := client.recv(65536):
            answer += part
    return answer


@pytest.mark.parametrize(
    "target",
    [
        "/", "/etc/passwd", "/../../etc/passwd", "PATH/..", "PATH?x", "PATH/", "PATH%20",
        "/ünïcode", "http://127.0.0.1PATH", "*", f"/{TOKEN}/0", "PATH\tx",
    ],
)  # fmt: skip
def test_only_the_exact_path_gets_the_weights(shelf, target):
    with offered(shelf, pack([("w", torch.ones(3))])) as url:
        path = path_of(url)
        request = f"GET {target.replace('PATH', path)} HTTP/1.1\r\n\r\n".encode()
        assert exchange(url, request)[9:12] in (b"404", b"400")
        assert exchange(url, f"GET {path} HTTP/1.1\r\n\r\n".encode()).startswith(b"HTTP/1.0 200")


def test_it_listens_on_the_one_address_and_tells_nothing_of_itself(shelf):
    assert shelf.address == "127.0.0.1"
    with offered(shelf, pack([])) as url:
        answer = exchange(url, b"POST /x HTTP/1.1\r\n\r\n")
    assert b"501" in answer
    assert b"Python" not in answer


def wait_for(what) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_clients_that_send_or_read_slowly_are_hung_up_on(shelf, monkeypatch):
    monkeypatch.setattr(vllm_offers, "REQUEST_S", 0.3)
    monkeypatch.setattr(vllm_offers, "patience_s", lambda nbytes: 0.5)
    most = shelf._server.clients._value
    with offered(shelf, pack([("w", torch.ones(2**23))])) as url:
        with connected(url) as sender:
            wait_for(lambda: dripped(sender))
        with connected(url) as reader:  # it never does
            reader.sendall(f"GET {path_of(url)} HTTP/1.1\r\n\r\n".encode())
            wait_for(lambda: shelf._server.clients._value < most)
            wait_for(lambda: shelf._server.clients._value == most)


def dripped(sender: socket.socket) -> bool:
    """Send a byte; whether the other side is gone."""
    try:
        sender.sendall(b"G")
    except OSError:
        return True
    time.sleep(0.05)
    return False


def test_too_many_clients_are_turned_away_and_the_next_is_served(monkeypatch):
    monkeypatch.setattr(vllm_offers, "MOST_CLIENTS", 3)
    shelf = BucketServer("127.0.0.1")
    clients = shelf._server.clients
    with offered(shelf, pack([("w", torch.ones(3))])) as url:
        many = [connected(url) for _ in range(3)]
        wait_for(lambda: clients._value == 0)
        with connected(url) as late:
            assert late.recv(1) == b""
        for client in many:
            client.close()
        wait_for(lambda: clients._value == 3)
        assert exchange(url, f"GET {path_of(url)} HTTP/1.1\r\n\r\n".encode())[9:12] == b"200"
    shelf.close()
