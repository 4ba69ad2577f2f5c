"""What a step asks of its training engine; this class is the engine of one process and of DDP."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..offload.engine_memory import EngineMemory
from .memory import BucketMemory

REFERENCE = "reference.pt"
HeadFunction = Callable[[Tensor, Tensor | None], Any]


def plain_head(linear: nn.Linear, function: HeadFunction) -> Any:
    return function(linear.weight, linear.bias)


class TrainingEngine:
    """`wrapped`: the module that the engine made of the model, which forwards go through; `model`:
    the model itself."""

    name = "DDP"
    splits_weights = False
    # whether all processes can repeat a step that failed on one: no micro-batch but the last one
    # waits for the other processes
    can_retry = True
    # a checkpoint can only be resumed by as many processes as have saved it
    checkpoints_are_tied = False
    # reads the weights of a checkpoint from its own files, under the model's own names
    loads_checkpoints = False

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def is_set_up(self, model: nn.Module) -> bool:
        """Whether the engine has prepared the model, as train() makes it do."""
        return True

    # The step

    def reducing(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Enter around forward and backward of a micro-batch; `last`: it is the step's last one."""
        return nullcontext() if last else self.accelerator.no_sync(wrapped)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.accelerator.backward(loss)

    def grad_norm(self) -> float | None:
        """L2 norm of the step's gradient, inf where any part of it is not finite.

        None: the Trainer's own computation is right.
        """
        return None

    def drop_gradients(self, wrapped: nn.Module) -> None:
        """Make the next optimizer step change nothing."""
        # without gradients no optimizer of torch changes weights or its state
        wrapped.zero_grad(set_to_none=True)

    def adopt_optimizer(self, optimizer: Any) -> None:
        """Called once, before `optimizer.step` is first called or wrapped."""

    # Weights

    def with_head(self, linear: nn.Linear, function: HeadFunction) -> Any:
        """function(weight, bias) of the whole lm_head; called within `wrapped`'s forward."""
        return plain_head(linear, function)

    @contextmanager
    def whole_weights(self, model: nn.Module) -> Iterator[None]:
        """While open, this process holds every weight, and forwards wait for no other."""
        yield

    def whole_state(
        self, model: nn.Module, names: Container[str] | None
    ) -> dict[str, Tensor] | None:
        """The tensors `names` (None: all) of state_dict(), on the main process' CPU (others: {}).

        None: nothing has to be gathered, the Trainer's own way of saving is right. A collective:
        every process calls.
        """
        return None

    def release_weights(self, model: nn.Module) -> None:
        """Free gathered weights after forwards that no backward pass follows."""

    def memory(self, wrapped: Callable[[], nn.Module | None]) -> EngineMemory:
        """What the engine keeps on the GPU for itself; `wrapped()`: see above."""
        return BucketMemory(wrapped, self.accelerator.num_processes)

    # The reference model

    def reference(self, model: nn.Module) -> nn.Module:
        """The frozen `model`, sharded as the policy is."""
        return model.to(self.accelerator.device)

    def move_towards(self, reference: nn.Module, policy: nn.Module, alpha: float) -> None:
        """reference <- alpha policy + (1 - alpha) reference; models of the same parameters."""
        theirs = dict(policy.named_parameters())
        for name, parameter in reference.named_parameters():
            parameter.lerp_(theirs[name].detach().to(parameter), alpha)

    # Checkpoints

    def saving(self, directory: str) -> AbstractContextManager[Any]:
        """Enter while the engine writes its part of a checkpoint; errors are raised at the end."""
        return nullcontext()

    def save_reference(self, model: nn.Module, directory: str) -> None:
        """Save a reference model that is synced with the policy. All processes must call this and
        load_reference."""
        if self.accelerator.is_main_process:
            torch.save(model.state_dict(), Path(directory) / REFERENCE)

    def load_reference(self, model: nn.Module, directory: str) -> None:
        saved = torch.load(Path(directory) / REFERENCE, map_location="cpu", weights_only=True)
        model.load_state_dict(saved)
