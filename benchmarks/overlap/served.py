"""The same run with a real vLLM server on loopback, in a process of its own on one core, while the
trainer has the other: a step of the synchronous run, its two parts, and steps sampled ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import models
from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.rollout.vllm.fit import CONNECT_S
from rloo_fast.rollout.vllm.transport import Endpoint, ServerGone

K, NUM_PROMPTS, PROMPT, LIMIT = 8, 4, 32, 96
START_S = 600
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": models.PAD,
    "bos_token_id": None,
    "eos_token_id": models.EOS,
}


def save_model(folder: Path) -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    model.save_pretrained(folder)
    models.make_tokenizer().save_pretrained(folder)


@contextmanager
def server(
    folder: Path, port: int, core: int | None, max_length: int = PROMPT + LIMIT
) -> Iterator[str]:
    """The address of a server that holds no weights yet, on one core if there are several."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    command += ["--weight-transfer-config", '{"backend": "rloo_fast"}', "--load-format", "dummy"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", str(max_length), "--block-size", "32"]
    command += ["--kv-cache-memory-bytes", str(128 << 20), "--max-num-seqs", "64"]
    command += ["--distributed-executor-backend", "uni", "--enable-scale-out"]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if core is not None:
        command = ["taskset", "-c", str(core), *command]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            try:
                Endpoint(url, CONNECT_S).get("/health")
                break
            except ServerGone:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "server.log").read_text()[-4000:]) from None
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def run(folder: Path, url: str, max_staleness: int, steps: int) -> list[dict[str, float]]:
    """The logs of every step but the first two, before which too little was sampled ahead."""
    out = folder / f"n{max_staleness}"
    shape = models.Shape("served", PROMPT, LIMIT, K, NUM_PROMPTS * (steps + 2))
    args = RLOOConfig(
        str(out), per_device_train_batch_size=K * NUM_PROMPTS, num_generations=K,
        max_completion_length=LIMIT, max_steps=steps + 2, use_vllm=True, vllm_mode="server",
        vllm_server_base_url=[url], beta=0.0, max_staleness=max_staleness, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, gradient_checkpointing=False,
        logging_steps=1, learning_rate=1e-5,
    )  # fmt: skip
    trainer = RLOOTrainer(
        str(folder / "model"),
        models.fixed_reward,
        args,
        Dataset.from_dict({"prompt": models.prompt_texts(shape)}),
        processing_class=models.make_tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.end()
    logs: list[dict[str, Any]] = [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    return [row for row in logs if "step_time" in row][2:]
