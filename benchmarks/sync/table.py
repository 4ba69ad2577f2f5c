"""Bytes and seconds of a sync by what is sent: all weights, LoRA merged into them, LoRA alone.

Each in the training process and through a server on this machine, there by gloo and by HTTP in
turn. The first sync by each way is not timed (an adapter's brings the frozen weights too), and
its log-probs must be those of the policy, as must those after the last.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import models as step_models
from benchmarks.common.harness import Row
from benchmarks.rollout.providers import BUCKET_BYTES, cache_bytes, largest_error
from rloo_fast.records import SentParts
from rloo_fast.rollout.vllm.colocate import VLLMEngine
from rloo_fast.rollout.vllm.pack import pack
from rloo_fast.rollout.vllm.server import VLLMServer
from rloo_fast.weight_sync.unmerged import adapter_shape, policy_buckets

from .policies import PROMPTS, SAMPLING, SHAPE, make_policy, wake_weights

WAYS = {"full": "full", "LoRA merged": "lora", "LoRA as adapter": "lora"}  # -> policy
LENGTH = SHAPE.prompt + SHAPE.limit
# largest |log-prob by the engine - by the policy|, which computes in float32
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.3}
START_S = 600.0


def table(args: argparse.Namespace) -> list[Row]:
    """A row per place and way."""
    if importlib.util.find_spec("vllm") is None:
        return [Row("sync", "all", args.model, "cpu", args.dtype, skipped="vllm is not installed")]
    dtype = getattr(torch, args.dtype)
    policies = {name: make_policy(args.model, name) for name in ("full", "lora")}
    rows = []
    for way, name in WAYS.items() if "colocate" in args.places else ():
        policy = policies[name]
        change_trained(policy)
        engine = _in_process(policy, dtype, is_apart=way == "LoRA as adapter")
        try:
            rows += _rows(f"colocate, {way}", engine, policy, dtype, args)
        finally:
            engine.close()
    if "server" not in args.places:
        return rows
    with _server(policies["full"], adapter_shape(policies["lora"]).rank, args) as url:
        for way, name in WAYS.items():
            policy = policies[name]
            shape = adapter_shape(policy) if way == "LoRA as adapter" else None
            engine = VLLMServer(url, timeout_s=START_S, adapter=shape, weight_transfer="http")
            rows += _rows(f"server, {way}", engine, policy, dtype, args, by=("http", "gloo"))
            engine.close()
    return rows


@torch.no_grad()
def change_trained(policy: Any) -> None:
    """As an optimizer step does: with adapters the other weights stay."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.01 * torch.randn_like(parameter))


def _rows(
    name: str,
    engine: Any,
    policy: Any,
    dtype: torch.dtype,
    args: argparse.Namespace,
    by: Sequence[str] = ("",),
) -> list[Row]:
    """A row per way `by` which weights reach the engine; these take turns."""
    rows = {way: Row("sync", ", ".join(filter(None, (name, way))), args.model, "cpu", args.dtype)
            for way in by}  # fmt: skip
    errors = {way: list[float]() for way in by}
    seconds = {way: list[float]() for way in by}
    turns = [(number, way) for number in range(args.runs + 1) for way in by]
    for version, (number, way) in enumerate(turns):
        change_trained(policy)
        wake_weights(engine)
        if way:
            engine.take_way(way)
        parts: SentParts = engine.wanted
        start = time.perf_counter()
        engine.load_weights(version, policy_buckets(policy, BUCKET_BYTES, dtype, parts))
        if number:
            seconds[way].append(time.perf_counter() - start)
        engine.wake(("kv_cache",))
        if number in (0, args.runs):
            rollout = engine.generate(PROMPTS, SAMPLING, range(len(PROMPTS)), version=version)
            errors[way].append(largest_error(policy, PROMPTS, rollout))
    sent = sum(_nbytes(engine, b) for b in policy_buckets(policy, BUCKET_BYTES, dtype, parts))
    for way, row in rows.items():
        row.error_vs_reference = error = max(errors[way])
        if not error <= TOLERANCE[dtype]:  # nan: refused
            row.skipped = f"wrong: log-probs off by {error:.1e} after a sync"
            continue
        row.set_times(seconds[way])
        row.add_note(f"{sent / 2**20:.2f} MiB sent")
        print(f"{row.provider}: {row.note}, {row.seconds_median:.3f} s, error {error:.1e}",
              flush=True)  # fmt: skip
    return [*rows.values()]


def _nbytes(engine: Any, bucket: Any) -> int:
    if isinstance(engine, VLLMServer):
        return pack(bucket, engine.sent_dtype).nbytes
    return sum(tensor.nbytes for _, tensor in bucket)


def _in_process(policy: Any, dtype: torch.dtype, *, is_apart: bool) -> VLLMEngine:
    base = policy.get_base_model() if hasattr(policy, "peft_config") else policy
    return VLLMEngine(
        base,
        dtype=dtype,
        max_model_length=LENGTH,
        adapter=adapter_shape(policy) if is_apart else None,
        engine_kwargs={"kv_cache_memory_bytes": cache_bytes(base.config, SHAPE)},
    )


@contextmanager
def _server(model: Any, rank: int, args: argparse.Namespace) -> Iterator[str]:
    """Its address, while the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        step_models.make_tokenizer().save_pretrained(Path(folder, "tokenizer"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        command += ["--tokenizer", str(Path(folder, "tokenizer")), "--load-format", "dummy"]
        command += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
        command += ["--weight-transfer-config", '{"backend": "rloo_fast"}', "--enforce-eager"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", args.dtype]
        command += ["--max-model-len", str(LENGTH), "--max-num-seqs", str(len(PROMPTS))]
        command += ["--kv-cache-memory-bytes", str(cache_bytes(model.config, SHAPE))]
        command += ["--enable-lora", "--max-lora-rank", str(rank)]
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
