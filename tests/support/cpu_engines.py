"""FSDP2 and DeepSpeed on CPUs, with gloo: what their GPU set-up does by itself is done by hand."""

from __future__ import annotations

import importlib
import json
import os
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import state as accelerate_state
from accelerate.utils import DistributedType
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rloo_fast.cli.recipe_files import path_of
from rloo_fast.distributed import choose

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def require_deepspeed() -> None:
    """Skip what needs DeepSpeed where it is not installed; in CI it must be."""
    if not os.environ.get("CI"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


def import_deepspeed() -> Any:
    """Without its compilers: that of the shared-memory kernels takes most of a minute; Muon's
    @torch.compile imports torch._inductor, which takes seconds, in each process."""
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with mock.patch("torch.compile", lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    return deepspeed


# For models this small what a large one meets by itself: every weight is split; the prefetch bucket
# holds a few of them; none is kept from the forward for the backward pass; a gradient bucket is of
# the size of the model's matrices.
LIKE_A_LARGE_MODEL = {
    "reduce_bucket_size": 2048,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 500,
    "stage3_max_reuse_distance": 0,
}


def engine_fields(engine: str | None, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """RLOOConfig fields that ask for the engine, or for a DeepSpeed recipe ("recipe:<name>"); what
    an earlier run in this process has chosen is forgotten.

    `more`: settings of fsdp_config, or of DeepSpeed's zero_optimization, in place of
    LIKE_A_LARGE_MODEL.
    """
    accelerate_state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate_state.GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    if engine in (None, "ddp"):
        return {}
    if engine == "fsdp2":
        upgrade_cpus_to_fsdp()
        return {"fsdp": True, "fsdp_config": {"version": 2, **(more or {})}}
    import_deepspeed()
    if engine.startswith("recipe:"):
        return {"deepspeed": json.loads(path_of(engine.removeprefix("recipe:")).read_text())}
    zero = {"stage": int(engine[-1]), **(LIKE_A_LARGE_MODEL if more is None else more)}
    return {"deepspeed": {"zero_optimization": zero, "bf16": {"enabled": "auto"}}}


def upgrade_cpus_to_fsdp() -> None:
    """accelerate makes FSDP of several GPUs, but DDP of several CPUs, whatever it is told."""
    state = accelerate_state.AcceleratorState
    if getattr(state, "upgrades_cpus", False):
        return
    own = state.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            # which every further AcceleratorState() is made of
            accelerate_state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.__init__ = init
    choose.makes_fsdp = lambda distributed_type: True
    state.upgrades_cpus = True  # pyright: ignore[reportAttributeAccessIssue]


def whole_state(trainer: Any) -> dict[str, torch.Tensor]:
    """Every parameter by name, whole, a copy; all processes must ask."""
    with trainer.parallel.whole_weights(trainer.model):
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
