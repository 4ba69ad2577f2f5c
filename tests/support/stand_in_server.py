"""What a trainer asks of a `vllm serve`, without a model: completions of zeros, in a given time.

It takes weights in so far as it fetches and drops them, pauses, resumes, labels tokens with the
version that was loaded when they came, and dies when told to. `test_vllm_servers.py` asks a real
server the same.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from rloo_fast.rollout.vllm.receiver import Receiver

ROOM = 1 << 20  # bytes of an update
PARAMS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed")


class StandInServer:
    """Serves on a port of its own until `die`. `token_s`: seconds per token; completions have
    `max_tokens` of them. `asked`: paths, in order."""

    def __init__(self, token_s: float = 0.01, *, scale_out: bool = True):
        self.token_s, self.scale_out = token_s, scale_out
        self.label, self.asked, self.num_fetched = "default", list[str](), 0
        self.running = threading.Event()  # not paused
        self.running.set()
        self.dead = False
        self._receiver = Receiver("0-0", torch.device("cpu"))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def die(self) -> None:
        """As a killed process: connections are reset, and nobody listens."""
        self.dead = True
        self.running.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def answer(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        name = path.partition("?")[0]
        self.asked.append(path)
        if name == "/server_info":
            config = {"logprobs_mode": "processed_logprobs", "generation_config": "vllm"}
            config |= {"max_model_len": 128, "dtype": "torch.float32"}
            return {"vllm_config": {"model_config": config}}
        if name == "/openapi.json":
            paths = {"/inference/v1/generate": {}} if self.scale_out else {}
            params = {"properties": {name: {} for name in PARAMS}}
            request = {"properties": {"sampling_params": params}}
            completion = {"properties": {}}
            schemas = {"GenerateRequest": request, "CompletionRequest": completion}
            return {"paths": paths, "components": {"schemas": schemas}}
        if name == "/inference/v1/generate":
            return self._complete(asked)
        if name == "/is_paused":
            return {"is_paused": not self.running.is_set()}
        if name == "/pause":
            self.running.clear()
        elif name == "/resume":
            self.running.set()
        elif name == "/init_weight_transfer_engine":
            info = asked["init_info"]
            if "meet" in info:
                self._receiver.meet(info["meet"], info.get("group"))
        elif name == "/update_weights":
            given = asked["update_info"]
            buckets = self._receiver.arrivals(given["url"], given.get("trainer", ""), ROOM)
            self.num_fetched += sum(bucket.nbytes for bucket in buckets)
        elif name in ("/update_weight_version", "/finish_weight_update"):
            self.label = asked.get("new_version") or asked["weight_version"]
        return {"weight_version": self.label, "success": True}

    def _complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        labels = []
        for _ in range(asked["sampling_params"]["max_tokens"]):
            time.sleep(self.token_s)
            self.running.wait()
            labels.append(self.label)
        starts = [i for i, label in enumerate(labels) if not i or labels[i - 1] != label]
        spans = zip(starts, [*starts[1:], len(labels)], strict=True)
        choice = {
            "finish_reason": "length",
            "token_ids": [0] * len(labels),
            "logprobs": {"content": [{"token_id": 0, "logprob": -1.0}] * len(labels)},
            "weight_versions": [{"version": labels[a], "start": a, "end": b} for a, b in spans],
        }
        return {
            "request_id": f"generate-tokens-{asked['request_id']}",
            "prompt_token_ids": asked["token_ids"],
            "choices": [choice],
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply({})

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self._reply(json.loads(self.rfile.read(length) or b"{}"))

            def _reply(self, asked: dict[str, Any]) -> None:
                server._connections.append(self.connection)
                body = json.dumps(server.answer(self.path, asked)).encode()
                if server.dead:
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                return

        return Handler
