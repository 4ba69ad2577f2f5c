"""(d) vLLM started twice in one process, whose own settings must stay as they were."""

from __future__ import annotations

import gc
import os
import random
import sys
import time
from typing import Any

import numpy as np
import torch

from .device import GIB, Skipped
from .part import Smoke
from .samplers import start_vllm
from .shapes import make_model


def run(smoke: Smoke) -> None:
    if smoke.engine != "vllm":
        raise Skipped("without vLLM there is no engine to start")
    on = smoke.device
    model = make_model("tiny" if smoke.dry else "0.5b", on.device).bfloat16()
    before, keys, used, changed = process_state(), [], [], set()
    for number in (1, 2):
        start = time.perf_counter()
        engine = start_vllm(model, smoke, max_length=128)
        smoke.record(**{f"start_{number}_s": time.perf_counter() - start})
        keys.append(engine.llm.llm_engine.vllm_config.compute_hash())
        now = process_state()
        changed |= {name for name in {*before, *now} if before.get(name) != now.get(name)}
        smoke.record(settings_changed=len(changed), which_changed=", ".join(sorted(changed)))
        engine.close()
        del engine
        gc.collect()
        on.release()
        used.append(on.used())
    smoke.record(
        compile_key_changed=int(keys[0] != keys[1]),
        leaked_gib=None if used[0] is None else (used[1] - used[0]) / GIB,
    )


def process_state() -> dict[str, Any]:
    """Of this process, what vLLM changes as it starts: settings of torch, random states, and the
    environment but for vLLM's own variables."""
    cuda = torch.backends.cuda
    state = {f"${k}": v for k, v in os.environ.items() if not k.startswith("VLLM_")} | {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "default dtype": torch.get_default_dtype(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn attention": cuda.cudnn_sdp_enabled(),
        "flash attention": cuda.flash_sdp_enabled(),
        "memory-efficient attention": cuda.mem_efficient_sdp_enabled(),
        "math attention": cuda.math_sdp_enabled(),
        "frozen objects": gc.get_freeze_count(),
        "excepthook": sys.excepthook,
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch random": bytes(torch.get_rng_state().tolist()),
        "grad mode": torch.is_grad_enabled(),
    }
    if hasattr(os, "sched_getaffinity"):
        state["cores"] = os.sched_getaffinity(0)
    if torch.cuda.is_available():
        state["cuda random"] = bytes(torch.cuda.get_rng_state().tolist())
        state["cuda device"] = torch.cuda.current_device()
    return state
