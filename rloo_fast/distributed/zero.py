"""DeepSpeed ZeRO, stages 1 to 3.

Accelerate updates the weights inside the last backward pass; here the engine's `backward` and
`step` are called apart, so that the gradient is looked at before it is applied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..offload.engine_memory import EngineMemory
from .base import HeadFunction, TrainingEngine
from .gathering import gathered, is_in_flight, kept_whole
from .inside_forward import without_hooks
from .memory import ZeroMemory
from .pickles import loading_only_data
from .saving import failing_at_the_end, gathered_state


class Zero(TrainingEngine):
    """ZeRO-1 and ZeRO-2: whole weights, split optimizer state (2: and gradients)."""

    can_retry = False
    checkpoints_are_tied = True
    loads_checkpoints = True

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        plugin: Any = accelerator.state.deepspeed_plugin
        self.config = plugin.deepspeed_config
        self.stage = self.config["zero_optimization"]["stage"]
        self.name = f"ZeRO-{self.stage}"

    @property
    def engine(self) -> Any:
        wrapped: Any = self.accelerator.deepspeed_engine_wrapped
        return wrapped.engine

    def is_set_up(self, model: nn.Module) -> bool:
        return self.accelerator.deepspeed_engine_wrapped is not None

    def reducing(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def grad_norm(self) -> float:
        return float(self.engine.optimizer.scaled_global_norm())

    def drop_gradients(self, wrapped: nn.Module) -> None:
        """Nothing to do: the engine's step leaves out a gradient that is not finite."""

    def adopt_optimizer(self, optimizer: Any) -> None:
        # in accelerate's wrapper it is empty
        optimizer.step = MethodType(lambda *_: self.engine.step(), optimizer)
        # the first moment that the engine is there, and before it loads
        self.engine.load_checkpoint = loading_only_data(self.engine.load_checkpoint)

    def memory(self, wrapped: Callable[[], nn.Module | None]) -> EngineMemory:
        def engine() -> Any:
            wrapper: Any = self.accelerator.deepspeed_engine_wrapped
            return None if wrapper is None else wrapper.engine

        return ZeroMemory(engine, self.stage, self.accelerator.num_processes)

    def reference(self, model: nn.Module) -> nn.Module:
        for parameter in model.parameters():  # buffers stay float32, as in the policy's engine
            parameter.data = parameter.data.to(_dtype(self.config))
        return model.to(self.accelerator.device)

    def saving(self, directory: str) -> AbstractContextManager[Any]:
        return failing_at_the_end(self.engine, directory)


class Zero3(Zero):
    """ZeRO-3: weights split too."""

    splits_weights = True

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        self._held = ExitStack()  # the lm_head, whole from its forward to its gradient
        self._waiting: set[int] = set()  # its parameters that have none yet

    def grad_norm(self) -> float:
        utils: Any = import_module("deepspeed.runtime.utils")
        return float(utils.combine_grad_norm_groups(self.engine.optimizer._get_norm_groups()))

    def with_head(self, linear: nn.Linear, function: HeadFunction) -> Any:
        # not by the lm_head's own forward, whose hooks would gather it for the backward pass again
        self._let_go()  # of a micro-batch that had no backward pass
        parameters = list(linear.parameters())
        self._held.enter_context(kept_whole(parameters))
        try:
            result = function(linear.weight, linear.bias)
        except BaseException:
            self._let_go()
            raise
        waiting = [p for p in parameters if p.requires_grad and torch.is_grad_enabled()]
        if not waiting:
            self._let_go()
        # a gradient can only be added to a parameter that is whole
        self._waiting = {id(p) for p in waiting}
        for parameter in waiting:
            hook = parameter.register_post_accumulate_grad_hook(self._has_gradient)
            self._held.callback(hook.remove)
        return result

    def _has_gradient(self, parameter: Any) -> None:
        self._waiting.discard(id(parameter))
        # no module computes with it any more, the embedding that may share it included
        parameter.ds_active_sub_modules.clear()
        if not self._waiting:
            self._let_go()

    def _let_go(self) -> None:
        self._held.pop_all().close()

    @contextmanager
    def whole_weights(self, model: nn.Module) -> Iterator[None]:
        with kept_whole(model.parameters()), without_hooks(model, "deepspeed"):
            yield

    def release_weights(self, model: nn.Module) -> None:
        # what was prefetched for a backward pass; what is whole may serve the next forward
        with kept_whole(filter(is_in_flight, model.parameters())):
            pass

    def whole_state(self, model: nn.Module, names: Container[str] | None) -> dict[str, Tensor]:
        return gathered_state(self.accelerator, model, names)

    def reference(self, model: nn.Module) -> nn.Module:
        import deepspeed  # pyright: ignore[reportMissingImports]

        if self.config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
            raise ValueError(
                "zero_hpz_partition_size: DeepSpeed makes such groups for one model only, and the "
                "reference would be a second: leave it out, or set beta=0."
            )
        config = copy.deepcopy(self.config)
        for training_only in ("optimizer", "scheduler"):
            config.pop(training_only, None)
        config["zero_optimization"].pop("offload_optimizer", None)
        return deepspeed.initialize(model=model, config=config)[0]

    def move_towards(self, reference: nn.Module, policy: nn.Module, alpha: float) -> None:
        import deepspeed  # pyright: ignore[reportMissingImports]

        theirs = dict(policy.named_parameters())
        for name, parameter in reference.named_parameters():
            (whole,) = gathered([theirs[name]])
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.lerp_(whole.to(parameter), alpha)

    def save_reference(self, model: nn.Module, directory: str) -> None:
        parts = {name: part.detach() for name, part in _own_parts(model)}
        torch.save(parts, self._reference_file(directory))

    def load_reference(self, model: nn.Module, directory: str) -> None:
        path = self._reference_file(directory)
        parts = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in _own_parts(model):
            part.data.copy_(parts[name])

    def _reference_file(self, directory: str) -> Path:
        return Path(directory) / f"reference_{self.accelerator.process_index}.pt"


def _own_parts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, this process' part) of every split parameter."""
    parameter: Any
    for name, parameter in model.named_parameters():
        yield name, parameter.ds_tensor


def copy_split(model: Any) -> nn.Module:
    """A model of the same class, configuration and weights, split in the same way.

    copy.deepcopy would copy the empty rest of split parameters. No weight is gathered: every
    process copies its own part.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):  # the weights it starts with are drawn
        copied = type(model)._from_config(model.config, dtype=model.dtype)
    with torch.no_grad():
        for new, old in zip(copied.parameters(), model.parameters(), strict=True):
            assert new.ds_shape == old.ds_shape, (new.ds_shape, old.ds_shape)
            new.ds_tensor.data.copy_(old.ds_tensor)
        for new, old in zip(copied.buffers(), model.buffers(), strict=True):
            new.copy_(old)
    return copied


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """What the engine computes in."""
    half = config.get("bf16", {}).get("enabled") is True
    return torch.bfloat16 if half else torch.float32
