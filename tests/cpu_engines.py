"""FSDP2 and DeepSpeed on CPUs, with gloo: what their GPU set-up does by itself is done by hand."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from accelerate import state as accelerate_state
from accelerate.utils import DistributedType
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def require_deepspeed() -> None:
    """Skip what needs DeepSpeed where it is not installed; in CI it must be."""
    if not os.environ.get("CI"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


def engine_fields(engine: str | None, **zero: Any) -> dict[str, Any]:
    """RLOOConfig fields that ask for the engine; what an earlier run in this process has chosen is
    forgotten. `zero`: more of DeepSpeed's zero_optimization."""
    accelerate_state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate_state.GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    if engine in (None, "ddp"):
        return {}
    if engine == "fsdp2":
        upgrade_cpus_to_fsdp()
        return {"fsdp": True, "fsdp_config": {"version": 2}}
    import deepspeed  # pyright: ignore[reportMissingImports]

    # the shared-memory kernels would be compiled first, for most of a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return {
        "deepspeed": {
            "zero_optimization": {
                "stage": int(engine[-1]),
                "stage3_param_persistence_threshold": 0,  # or models this small are not split
                **zero,
            },
            "bf16": {"enabled": "auto"},
        }
    }


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
    state.upgrades_cpus = True  # pyright: ignore[reportAttributeAccessIssue]


def whole_state(trainer: Any) -> dict[str, torch.Tensor]:
    """Every parameter by name, whole, a copy; all processes must ask."""
    with trainer.parallel.whole_weights(trainer.model):
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
