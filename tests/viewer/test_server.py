"""The server answers this machine's browser alone, and says nothing but what it is asked."""

from __future__ import annotations

import gzip
import http.client
import json

import pytest

from rloo_fast.viewer.pages import ASSETS
from tests.viewer.conftest import EVIL, served


@pytest.fixture(scope="module")
def server(finished):
    with served(finished) as running:
        yield running


def ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_it_listens_on_the_loopback_alone(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8321", "127.0.0.1.evil.example", "localhost.evil.example:1",
     "evil.example@127.0.0.1", "0.0.0.0", "127.0.0.1:8321:evil.example", ""],
)  # fmt: skip
def test_another_name_for_this_address_is_refused(server, host):
    response, body = ask(server, "/api/runs", Host=host)
    assert response.status == 403
    assert b"first" not in body


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "localhost:1", "localhost"])
def test_a_port_that_is_forwarded_is_this_machine_too(server, host):
    assert ask(server, "/api/runs", Host=host)[0].status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_only_reading_is_offered(server, method):
    assert ask(server, "/api/runs", method)[0].status == 501


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml", "/assets/../pages.py", "/assets/..%2fpages.py", "/etc/passwd",
        "/assets/", "/assets/nothing.js", "/api", "//127.0.0.1/assets/app.js/..",
    ],
)  # fmt: skip
def test_nothing_but_the_assets_is_served(server, path):
    assert ask(server, path)[0].status == 404


@pytest.mark.parametrize("name", ASSETS)
def test_every_asset_is_served_under_its_type(server, name):
    response, body = ask(server, f"/assets/{name}")
    assert response.status == 200
    assert body == ASSETS[name].read_bytes()
    kinds = {"js": "text/javascript", "css": "text/css", "html": "text/html", "svg": "image/svg"}
    assert response.headers["Content-Type"].startswith(kinds[name.rpartition(".")[2]])


@pytest.mark.parametrize("path", ["/", "/api/runs", "/nothing"])
def test_no_page_may_load_or_run_what_is_not_here(server, path):
    headers = ask(server, path)[0].headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("nothing", 404, "there is no 'nothing'"),
        ("curves", 400, "run must be a number, got ''"),
        ("curves?run=1", 400, "run must be below 1, got 1"),
        ("curves?run=-1", 400, "run must be a number"),
        ("curves?run=" + "9" * 99, 400, "run must be a number"),
        ("completions?run=0&step=99", 400, "step 99 of first is not kept"),
        ("completions?run=0&step=x", 400, "step must be a number, got 'x'"),
        ("tokens?run=0&step=1&row=999", 400, "has 16 rows"),
        ("prompt?run=0", 400, "id is missing"),
    ],
)
def test_a_question_that_means_nothing_is_answered_so(server, path, status, said):
    response, body = ask(server, f"/api/{path}")
    assert response.status == status
    assert said in json.loads(body)["error"]


def test_answers_are_json_and_small_when_asked(server):
    path = "/api/completions?run=0&step=2"
    plain = ask(server, path)[1]
    _, packed = ask(server, path, **{"Accept-Encoding": "gzip"})
    assert gzip.decompress(packed) == plain
    assert len(packed) < len(plain)
    found = json.loads(plain)
    assert [row["completion"] for row in found["rows"][:4]] == [*EVIL]
    assert len(found["prompts"]) == 4
    assert "prompt" not in found["rows"][0]


def test_head_has_no_body(server):
    response, body = ask(server, "/api/runs", "HEAD")
    assert response.status == 200
    assert body == b""
