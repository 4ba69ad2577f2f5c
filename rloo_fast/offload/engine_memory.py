"""What a training engine keeps on the GPU beside parameters, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class EngineMemory:
    """Of an engine that keeps nothing else; engines that do are subclasses."""

    def moves_optimizer(self) -> bool:
        """Whether `move_out` moves the optimizer's state and `with_optimizer()`, which otherwise
        are moved storage by storage."""
        return False

    def with_optimizer(self) -> Sequence[Tensor]:
        """What moves together with the optimizer's state, such as float32 master weights."""
        return ()

    def moved_by_itself(self) -> Sequence[Tensor]:
        """What else `move_out` frees."""
        return ()

    def fixed(self) -> Sequence[Tensor]:
        """What stays; tensors that are counted elsewhere may be among it."""
        return ()

    def fixed_bytes(self) -> int:
        """Bytes that stay and that no tensor in Python shows."""
        return 0

    def expected(self, model: nn.Module) -> tuple[int, int]:
        """(bytes that will move with the optimizer, that will stay) once there is a step.

        Adam's state: 2 x the trained weights.
        """
        return 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad), 0

    def move_out(self) -> None:
        """Move what the engine moves by itself to the host."""

    def move_back(self) -> None:
        """Undo `move_out`; one that failed half-way as well."""
