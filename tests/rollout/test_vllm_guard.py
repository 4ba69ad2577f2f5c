"""Who may use a rollout server's endpoints, and where the key comes from."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace

import pytest

from rloo_fast.rollout.vllm import guard as vllm_guard
from rloo_fast.rollout.vllm.guard import Guard
from rloo_fast.rollout.vllm.http import api_key
from tests.support.tiny import require_vllm

KEY = "key-of-the-server"
CONTROL = ("/update_weights", "/start_weight_update", "/collective_rpc", "/sleep", "/server_info")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("VLLM_API_KEY", "RLOO_FAST_API_KEY_FILE", "RLOO_FAST_TRAINER_HOST"):
        monkeypatch.delenv(name, raising=False)


def status(keys, path, headers=(), *, client="127.0.0.1", host="127.0.0.1:8000", **more) -> int:
    """What a request gets: 200 from the server behind the guard, or the guard's own answer."""
    sent = []

    async def server(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "server": ("10.0.0.1", 8000)}
    scope |= {"client": (client, 5), "headers": [(b"host", host.encode()), *headers], **more}
    asyncio.run(Guard(server, keys=keys)(scope, None, send))
    return sent[0].get("status", sent[0].get("code"))


def bearer(key: str, scheme: str = "Bearer") -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"{scheme} {key}".encode())]


@pytest.mark.parametrize("path", [*CONTROL, "/v1/completions", "/invocations", "/health/../sleep"])
def test_with_a_key_nothing_answers_without_it(path):
    assert status([KEY], path) == 401
    assert status([KEY], path, bearer(KEY)) == 200
    assert status(["another", KEY], path, bearer(KEY, "bearer")) == 200


@pytest.mark.parametrize(
    "headers",
    [
        bearer(""), bearer("key"), bearer(KEY + "x"), bearer(KEY.upper()), bearer(KEY, "Basic"),
        bearer(KEY) * 2, [(b"authorization", KEY.encode())], [(b"authorization", b"\xff\x00")],
        [(b"x-api-key", KEY.encode())], [(b"cookie", f"authorization={KEY}".encode())],
    ],
)  # fmt: skip
def test_what_is_not_exactly_the_key_is_refused(headers):
    assert status([KEY], "/update_weights", headers) == 401


def test_probes_of_an_orchestrator_need_no_key_and_change_nothing():
    assert status([KEY], "/health", method="GET", client="9.9.9.9") == 200
    assert status([KEY], "/health", client="9.9.9.9") == 401
    assert status([KEY], "/health/", method="GET") == 401
    assert status([KEY], "/api/health", method="GET", root_path="/api") == 200


def test_neither_a_websocket_nor_a_preflight_gets_round_the_key():
    assert status([KEY], "/v1/realtime", type="websocket") == 1008
    assert status([KEY], "/update_weights", method="OPTIONS") == 401


@pytest.mark.parametrize("path", [*CONTROL, "/v1/load_lora_adapter", "/v1/unload_lora_adapter/"])
def test_without_a_key_only_this_machine_controls_the_server(path):
    assert status([], path) == 200
    assert status([], path, client="::ffff:127.0.0.1", host="localhost") == 200
    assert status([], path, client="10.0.0.1", host="10.0.0.1:8000") == 200  # its own address
    assert status([], path, client="10.0.0.1", host=f"{socket.gethostname()}:8000") == 200
    assert status([], path, client="10.0.0.2", host="10.0.0.1:8000") == 401
    assert status([], path, client="10.0.0.2", host="127.0.0.1") == 401
    assert status([], "/v1/completions", client="10.0.0.2") == 200  # as vLLM does


@pytest.mark.parametrize(
    ("headers", "more"),
    [
        ([(b"origin", b"http://evil.example")], {}),  # a page in this machine's browser
        ([(b"sec-fetch-site", b"cross-site")], {}),
        ([], {"host": "evil.example:8000"}),  # DNS rebinding
        ([], {"host": "localhost.evil.example"}),
        ([(b"host", b"evil.example")], {}),  # two of them
        ([(b"x-forwarded-for", b"127.0.0.1")], {}),  # a proxy, for another machine
        ([(b"forwarded", b"for=127.0.0.1")], {}),
        ([], {"client": None}),
        ([], {"client": ""}),
    ],
)
def test_a_browser_or_a_proxy_is_not_this_machine(headers, more):
    if "client" in more:
        more = {**more, "client": more["client"] or "unix"}
    assert status([], "/sleep", headers, **more) == 401


def arguments(backend="rloo_fast", api_key=None):
    return SimpleNamespace(
        weight_transfer_config=SimpleNamespace(backend=backend), api_key=api_key, root_path=None
    )


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_puts_the_guard_before_everything_else(monkeypatch):
    """vLLM's own builder of a server: the last middleware that is added is asked first."""
    require_vllm()
    from fastapi import FastAPI
    from vllm.entrypoints.launchers import app as launcher
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setenv("VLLM_API_KEY", KEY)
    vllm_guard.install()
    parser = make_arg_parser(FlexibleArgumentParser())
    for backend, guarded in (("rloo_fast", True), ("nccl", False)):
        args = parser.parse_args(["--weight-transfer-config", f'{{"backend": "{backend}"}}'])
        app = FastAPI()
        launcher.init_entrypoints_middleware(args, app, ("generate",))
        assert (app.user_middleware[0].cls is Guard) == guarded
    assert launcher.init_entrypoints_middleware.__module__ == vllm_guard.__name__


def test_a_trainer_elsewhere_needs_a_key(monkeypatch):
    monkeypatch.setenv("RLOO_FAST_TRAINER_HOST", "10.0.0.7")
    with pytest.raises(ValueError, match="lets another machine control"):
        vllm_guard._keys(arguments())
    assert vllm_guard._keys(arguments(api_key=["a", "b"])) == ["a", "b"]
    monkeypatch.setenv("RLOO_FAST_TRAINER_HOST", "http://10.0.0.7:80")
    with pytest.raises(ValueError, match="host names, addresses and networks"):
        vllm_guard._keys(arguments(api_key=["a"]))


def test_the_key_is_read_from_the_environment_or_a_file(monkeypatch, tmp_path):
    assert api_key() is None
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    monkeypatch.setenv("RLOO_FAST_API_KEY_FILE", str(path))
    assert api_key() == KEY
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with pytest.raises(ValueError, match="both set"):
        api_key()
    monkeypatch.delenv("RLOO_FAST_API_KEY_FILE")
    assert api_key() == KEY


@pytest.mark.parametrize("text", ["", " \n", "two words", "line\nbreak", "käse", "x\x00y", "x\r"])
def test_a_file_without_a_key_is_an_error_that_does_not_show_it(text, monkeypatch, tmp_path):
    path = tmp_path / "key"
    path.write_text(text, newline="")
    monkeypatch.setenv("RLOO_FAST_API_KEY_FILE", str(path))
    if text == "x\r":
        assert api_key() == "x"
        return
    with pytest.raises(ValueError, match="one word of printable ASCII") as caught:
        api_key()
    assert not text.strip() or text.strip() not in str(caught.value)


def test_a_key_file_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("RLOO_FAST_API_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"RLOO_FAST_API_KEY_FILE names cannot be read"):
        api_key()
