"""The step's side of a training engine; as it is, of one process and of DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

REFERENCE = "reference.pt"
HeadFunction = Callable[[Tensor, Tensor | None], Any]


def plain_head(linear: nn.Linear, function: HeadFunction) -> Any:
    return function(linear.weight, linear.bias)


class Parallel:
    """`wrapped`: what the engine made of the model, and calls go through. `model`: the bare one."""

    name = "DDP"
    splits_weights = False
    # a step that failed on one process can be taken again by all: neither forward nor backward of
    # any micro-batch but the last one waits for the other processes
    can_retry = True
    # a checkpoint can only be resumed by as many processes as have saved it
    checkpoints_are_tied = False
    # reads the weights of a checkpoint from its own files, under the model's own names
    loads_checkpoints = False

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def is_set_up(self, model: nn.Module) -> bool:
        """Whether the engine holds the model yet, which train() sees to."""
        return True

    # The step

    def reducing(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; `last`: of the step."""
        return nullcontext() if last else self.accelerator.no_sync(wrapped)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.accelerator.backward(loss)

    def grad_norm(self) -> float | None:
        """L2 norm of the step's gradient; None: the Trainer's own is right. inf where any part of
        it is not finite."""
        return None

    def drop_gradients(self, wrapped: nn.Module) -> None:
        """Let the optimizer step to come change nothing."""
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

    def whole_state(self, model: nn.Module) -> dict[str, Tensor] | None:
        """What save_pretrained writes, on the main process' CPU (others: {}); None: the Trainer's
        own way is right. All processes must ask."""
        return None

    def let_go(self, model: nn.Module) -> None:
        """After forwards that no backward pass follows: keep no more than this process' part."""

    # The reference model

    def reference(self, model: nn.Module) -> nn.Module:
        """The frozen `model`, held as the policy is held."""
        return model.to(self.accelerator.device)

    def move_towards(self, reference: nn.Module, policy: nn.Module, alpha: float) -> None:
        """reference <- alpha policy + (1 - alpha) reference; models of the same parameters."""
        theirs = dict(policy.named_parameters())
        for name, parameter in reference.named_parameters():
            parameter.lerp_(theirs[name].detach().to(parameter), alpha)

    # Checkpoints

    def saving(self, directory: str) -> AbstractContextManager[Any]:
        """Around the engine's own part of a checkpoint: what fails in it is raised at its end."""
        return nullcontext()

    def save_reference(self, model: nn.Module, directory: str) -> None:
        """A reference model that moves; all processes must call, as for load_reference."""
        if self.accelerator.is_main_process:
            torch.save(model.state_dict(), Path(directory) / REFERENCE)

    def load_reference(self, model: nn.Module, directory: str) -> None:
        model.load_state_dict(torch.load(Path(directory) / REFERENCE, map_location="cpu"))
