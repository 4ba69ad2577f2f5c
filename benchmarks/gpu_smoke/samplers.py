"""Engines that hold weights of their own: vLLM, or transformers' generate on a second model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rloo_fast.records import Rollout, Sampling
from rloo_fast.rollout import HFEngine
from rloo_fast.rollout.engine import EngineState

from .part import Smoke
from .shapes import PAD

SHARE = 0.3  # of the GPU's memory, for vLLM


def start_vllm(model: Any, smoke: Smoke, *, max_length: int) -> Any:
    """A VLLMEngine in bfloat16 that has no weights yet; it sleeps as in a run, on a GPU."""
    from rloo_fast.rollout.vllm.colocate import VLLMEngine

    return VLLMEngine(
        model,
        dtype=torch.bfloat16,
        sleeps=smoke.device.is_cuda,
        max_model_length=max_length,
        max_num_seqs=256,
        gpu_memory_utilization=SHARE,
        engine_kwargs={} if smoke.device.is_cuda else {"kv_cache_memory_bytes": 32 << 20},
    )


class Sampler:
    """One of the two, in bfloat16, with a model whose weights are only those that were loaded."""

    def __init__(self, model: Any, smoke: Smoke, *, max_length: int):
        self._version = 0
        self._level = 2 if smoke.device.is_cuda else 0  # at which it sleeps while it is loaded
        self._served: Any = None  # the second model, of transformers
        if smoke.engine == "vllm":
            self.engine: Any = start_vllm(model, smoke, max_length=max_length)
        else:
            self._served = copy.deepcopy(model).bfloat16()
            self.engine = HFEngine(self._served, PAD, autocast=nullcontext)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Sleep, wake, and take all of these, by their names in a checkpoint."""
        engine = self.engine
        if engine.state is EngineState.READY:
            engine.sleep(self._level)
        engine.wake(("weights",))
        self._version += 1
        bucket = [(name, weight.detach().bfloat16()) for name, weight in weights.items()]
        if self._served is not None:
            self._served.load_state_dict(dict(bucket))
        engine.load_weights(self._version, [bucket])
        engine.wake(("kv_cache",))

    def close(self) -> None:
        self.engine.close()

    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: Sequence) -> Rollout:
        """`seeds`: a number for each prompt; with vLLM also None for each."""
        return self.engine.generate(prompts, sampling, seeds, version=self._version)
