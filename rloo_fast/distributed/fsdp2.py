"""FSDP2 (torch's fully_shard), as accelerate sets it up."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import load_fsdp_model, save_fsdp_model
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, StateDictType

from ..offload.engine_memory import EngineMemory
from .base import HeadFunction, TrainingEngine
from .inside_forward import run_inside, without_hooks
from .memory import ShardMemory
from .pickles import only_data
from .saving import gathered_state


def adjust(plugin: Any) -> None:
    """Change the settings that accelerate chose by itself.

    Gradients are reduced and the loss is returned in float32, which for bf16 would both be rounded
    to it; a policy that the user made stays. Checkpoints to resume from are written by every
    process for itself: the whole model is saved beside them, and once is enough.
    """
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # of another type
    plugin.set_state_dict_type(StateDictType.SHARDED_STATE_DICT)
    policy = plugin.mixed_precision_policy
    if isinstance(policy, MixedPrecisionPolicy) and policy.param_dtype == policy.output_dtype:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32
        )


class FSDP2(TrainingEngine):
    name = "FSDP2"
    splits_weights = True
    can_retry = False
    loads_checkpoints = True

    def is_set_up(self, model: nn.Module) -> bool:
        return isinstance(model, FSDPModule)

    def reducing(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()  # waiting for the last one would keep whole gradients on every process

    def with_head(self, linear: nn.Linear, function: HeadFunction) -> Any:
        # the lm_head's own forward is what gathers its weight, and with it the rest of its unit
        return run_inside(linear, linear, lambda: function(linear.weight, linear.bias))

    @contextmanager
    def whole_weights(self, model: nn.Module) -> Iterator[None]:
        try:
            for unit in _units(model):
                unit.unshard()
            with without_hooks(model, "torch.distributed.fsdp"):
                yield
        finally:
            self.release_weights(model)

    def release_weights(self, model: nn.Module) -> None:
        # the unit of the lm_head stays gathered until a backward pass would have used it
        for unit in _units(model):
            unit.reshard()

    def whole_state(self, model: nn.Module, names: Container[str] | None) -> dict[str, Tensor]:
        return gathered_state(self.accelerator, model, names)

    def memory(self, wrapped: Callable[[], nn.Module | None]) -> EngineMemory:
        return ShardMemory(self.accelerator.num_processes)

    def reference(self, model: nn.Module) -> nn.Module:
        from accelerate.utils import fsdp2_prepare_model

        split: Any = fsdp2_prepare_model(self.accelerator, model)
        # its last layers would stay whole, waiting for a backward pass
        split.set_reshard_after_forward(True)
        return split

    @contextmanager
    def saving(self, directory: str) -> Iterator[None]:
        try:
            yield
        except CheckpointException as error:  # raised on all processes, and not an Exception
            failures = {rank: failure for rank, (failure, _) in error.failures.items()}
            raise OSError(f"failures by process: {failures}") from None

    def save_reference(self, model: nn.Module, directory: str) -> None:
        plugin = self.accelerator.state.fsdp_plugin
        with self.saving(directory):
            save_fsdp_model(plugin, self.accelerator, model, directory, 1)

    def load_reference(self, model: nn.Module, directory: str) -> None:
        plugin = self.accelerator.state.fsdp_plugin
        with only_data():
            load_fsdp_model(plugin, self.accelerator, model, directory, 1)


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
