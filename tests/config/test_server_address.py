"""The address of a rollout server is read before a model is loaded."""

from __future__ import annotations

import pytest

from rloo_fast import RLOOConfig
from rloo_fast.config.server_address import read_address


def test_its_parts():
    assert read_address("https://host/v/") == ("host", None, "/v", True)
    assert read_address("http://[::1]:81") == ("::1", 81, "", False)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@host:8000", "http://secret@host", "http://host:8000?key=secret",
        "http://host#secret", "http://user:secret@host:x",
    ],
)  # fmt: skip
def test_one_with_a_password_is_refused_without_showing_it(url, tmp_path):
    with pytest.raises(ValueError, match="a key belongs in VLLM_API_KEY") as caught:
        RLOOConfig(str(tmp_path), use_vllm=True, vllm_mode="server", vllm_server_base_url=url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        *({"vllm_server_base_url": url} for url in (
            "host:8000", "ftp://host", "http://", "http://host:x", "http://host:99999", 5,
            "http://[::1", "http://ho st:8000", "http://host:80\r\nX: y", "file:///etc/passwd",
        )),
        {"vllm_server_host": "http://host"}, {"vllm_server_host": ""}, {"vllm_server_host": "a b"},
    ],
)  # fmt: skip
def test_one_that_is_none_is_refused(fields, tmp_path):
    with pytest.raises(ValueError, match="http://localhost:8000"):
        RLOOConfig(str(tmp_path), use_cpu=True, use_vllm=True, vllm_mode="server", **fields)


@pytest.mark.parametrize("port", [65536, -1, "x"])
def test_a_port_that_is_none_is_refused(port, tmp_path):
    with pytest.raises(ValueError, match="vllm_server_port must be an integer from 1 to 65535"):
        RLOOConfig(str(tmp_path), use_vllm=True, vllm_mode="server", vllm_server_port=port)
