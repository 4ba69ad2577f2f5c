"""A real `vllm serve` on this machine's CPU, of a tiny model, for as long as a block lasts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rloo_fast.rollout.engine import EngineError
from rloo_fast.rollout.vllm.transport import Endpoint

from .launch import free_port
from .tiny import make_model, make_tokenizer, require_vllm
from .vision import make_processor, make_vision_model

MAX_MODEL_LEN = 128
KEY = "key-of-the-server"


def tiny(seed: int) -> Any:
    """vLLM on a CPU has no heads smaller than 32."""
    return make_model(seed, hidden_size=64, num_attention_heads=2, num_key_value_heads=1).eval()


@dataclass
class Started:
    url: str
    process: subprocess.Popen
    log: Path

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def serving(
    folder: Path,
    *options: str,
    dtype: str = "float32",
    executor: str = "uni",
    family: str | None = None,
    model: Any = None,
    tokenizer: Any = None,
) -> Iterator[Started]:
    """A server with a key that has never seen a weight of the policy, and with LoRA; the key is in
    the environment meanwhile. `executor`: "uni" is a process less to start. `family`: of a model
    with images, see vision.py. `model`, `tokenizer`: in place of the tiny ones."""
    require_vllm()
    port, log = free_port(), folder / "log"
    (folder / "key").write_text(KEY)
    if family is None:
        (model or tiny(0)).config.save_pretrained(folder)
        (tokenizer or make_tokenizer()).save_pretrained(folder / "tokenizer")
    else:
        model = make_vision_model(family, wide=True)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        processor = make_processor(family)
        processor.save_pretrained(folder)
        processor.tokenizer.save_pretrained(folder / "tokenizer")
        options = (*options, "--limit-mm-per-prompt", '{"video": 0}')
        options = (*options, "--mm-processor-kwargs", '{"use_fast": false}')
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--tokenizer", str(folder / "tokenizer")]
    command += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    command += ["--weight-transfer-config", '{"backend": "rloo_fast"}', "--load-format"]
    command += ["rloo_fast"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    command += ["--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN), "--block-size", "32"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "16"]
    command += ["--distributed-executor-backend", executor]
    command += ["--enable-lora", "--max-lora-rank", "8", "--enable-scale-out", *options]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # two workers may share a core
    environment |= {"RLOO_FAST_API_KEY_FILE": str(folder / "key"), "VLLM_API_KEY": ""}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    started = Started(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_up(started)
        with pytest.MonkeyPatch.context() as patch:  # a trainer finds the key in its environment
            patch.setenv("VLLM_API_KEY", KEY)
            yield started
    finally:
        started.kill()


def _wait_until_up(started: Started) -> None:
    for _ in range(900):
        try:
            Endpoint(started.url, 5).get("/health")
            return
        except EngineError:
            assert started.process.poll() is None, started.log.read_text()[-4000:]
            time.sleep(1)
    raise AssertionError(started.log.read_text()[-4000:])
