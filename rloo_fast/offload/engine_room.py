"""Move the trainer's state to the host while the rollout engine is awake, and back afterwards.

Beside the engine the GPU holds the policy's weights (they stay: the engine is loaded from them),
gradients (None between steps), optimizer state, the reference model, reward models, and what the
training engine keeps for itself (`EngineMemory`). `plan` decides which of these move, `EngineRoom`
moves them. Whole storages are copied: the tensor objects, their ties, views and strides stay as
they are, and every bit comes back. What a training engine moves by itself, it moves whole as well.

Of optimizer state that FSDP2 shards, this process's part moves. Other subclasses of Tensor (sharded
weights, of which FSDP2 holds further views, and quantised ones) are counted, but are not moved.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .engine_memory import EngineMemory
from .gpu import Gpu
from .memory_plan import GIB, Holdings, MemoryPlan, best_share, plan
from .storages import by_storage, held_by, is_plain, point, whole_storage

logger = logging.getLogger(__name__)

OnMove = Callable[[float, int], None]
NOTHING_ELSE = EngineMemory()
# an estimate, not measured: CUDA context, kernels' workspaces, fragmentation
RESERVE = 2 * GIB
OF_THE_DRIVER = GIB  # of it, for what torch does not allocate


class EngineRoom:
    """Frees GPU memory for an engine that takes `share` of the GPU: make(), later give_back().

    share None: the one that is best for an engine that needs `need` bytes (see `best_share`), which
    is then in `share`; on a CPU it stays None.

    `optimizer()`: the trainer's at the time of the call, None before there is one. `others`:
    modules that stay on the GPU, such as reward models. `memory`: the training engine's. The plan
    is made and logged (`say`) at once, with what the first step will make estimated, and once more
    when that is known. Raises ValueError if the engine does not fit.

    `on_move(seconds, bytes)` is called by give_back(): what both took, and went there and back.

    Whatever else is in use when a plan is made stays, and is counted; what the rollout engine has
    while it sleeps is of its share.

    `is_made` is true from make() to give_back(), on a CPU too: no optimizer step and no reference
    forward may run in between. A checkpoint may be saved at any time (the tensors are whole, on the
    host), and give_back() may be called at any time the GPU has the memory for it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[], Any],
        reference: nn.Module | None,
        device: torch.device,
        *,
        share: float | None,
        need: int | None = None,
        reserve: int = RESERVE,
        others: Iterable[nn.Module] = (),
        memory: EngineMemory = NOTHING_ELSE,
        say: Callable[[str], None] = logger.info,
        gpu: Gpu | None = None,
        on_move: OnMove | None = None,
    ):
        self.memory, self.on_move = memory, on_move
        self.model, self.optimizer, self.reference = model, optimizer, reference
        self.share, self.need, self.reserve = share, need, reserve
        self.others, self.say = tuple(others), say
        self.is_made = False
        self._moved: list[tuple[list[Tensor], Tensor]] = []  # tensors of a storage, its host copy
        self._moving_s = 0.0  # that make() took
        self._made_at = 0  # bytes allocated after make()
        self._of_the_engine: int | None = None  # bytes that the sleeping engine has allocated
        self._gpu = Gpu(device) if gpu is None and device.type == "cuda" else gpu
        self.plan: MemoryPlan | None = None
        if self._gpu is None:
            say("On a CPU there is nothing to move out of the rollout engine's way.")
        else:
            self._decide(self._gpu)

    def make(self) -> None:
        """Before the engine wakes: move what the plan names to the host. Twice is once."""
        if self._gpu is not None and not self.is_made:
            start = time.perf_counter()
            self._move_out(self._gpu)
            self._moving_s = time.perf_counter() - start
        self.is_made = True

    def give_back(self) -> None:
        """After the engine slept: move back exactly what make() moved; without make(), nothing."""
        if self._gpu is not None and self.is_made:
            start, num_bytes = time.perf_counter(), self._bytes_moved()
            self._move_back(self._gpu)
            if self.on_move is not None:
                self.on_move(self._moving_s + time.perf_counter() - start, num_bytes)
        self.is_made = False

    def _bytes_moved(self) -> int:
        num_bytes = sum(host.nbytes for _, host in self._moved)
        assert self.plan is not None
        by_the_engine = "optimizer" in self.plan.moved and self.memory.moves_optimizer()
        return num_bytes + (self.plan.holdings.optimizer if by_the_engine else 0)

    def _decide(self, gpu: Gpu) -> MemoryPlan:
        """The plan: measured again until there is optimizer state, logged where it changed."""
        known = self.plan
        if known is not None and not known.holdings.estimated:
            return known
        held = measure(
            self.model,
            self.optimizer(),
            self.reference,
            gpu,
            others=self.others,
            memory=self.memory,
            allocated=gpu.allocated() - (self._of_the_engine or 0),
            elsewhere=max(0, gpu.elsewhere() - OF_THE_DRIVER),
        )
        total = gpu.total()
        if self.share is None:
            self.share = best_share(total, held, self.reserve, self.need)
        self.plan = plan(total, int(self.share * total), held, self.reserve)
        if known is None or known.moved != self.plan.moved:
            self.say(str(self.plan))
        return self.plan

    # Both copy everything before they change any tensor: a copy that fails changes nothing

    def _move_out(self, gpu: Gpu) -> None:
        moved = self._decide(gpu).moved
        groups = _groups(self.model, self.optimizer(), self.reference, self.memory)
        blocks = _blocks(groups, gpu)
        names = [name for name in moved if name != "optimizer" or not self.memory.moves_optimizer()]
        moving = [tensors for name in names for tensors in blocks[name]]
        hosts = gpu.to_host([whole_storage(tensors[0]) for tensors in moving])
        gpu.synchronize()
        if "optimizer" in moved:
            try:
                self.memory.move_out()
            except BaseException:
                self.memory.move_back()
                raise
        self._moved = list(zip(moving, hosts, strict=True))
        for tensors, host in self._moved:
            point(tensors, host)
        gpu.release()
        self._made_at = gpu.allocated()

    def _move_back(self, gpu: Gpu) -> None:
        if self._of_the_engine is None:  # the engine was started since make()
            self._of_the_engine = max(0, gpu.allocated() - self._made_at)
        blocks = [gpu.to_device(host) for _, host in self._moved]
        gpu.synchronize()
        self.memory.move_back()
        for (tensors, _), block in zip(self._moved, blocks, strict=True):
            point(tensors, block)
        self._moved = []


def measure(
    model: nn.Module,
    optimizer: Any,
    reference: nn.Module | None,
    gpu: Gpu,
    *,
    others: Iterable[nn.Module] = (),
    memory: EngineMemory = NOTHING_ELSE,
    allocated: int = 0,
    elsewhere: int = 0,
) -> Holdings:
    """Bytes on `gpu` now, of every storage once; what the first step will make is estimated.

    `allocated`: bytes of this process' tensors, whoever holds them; what this finds less is of
    `buffers`, as are the bytes `elsewhere`.
    """
    groups = _groups(model, optimizer, reference, memory)
    estimated = not any(True for _ in _state_of(optimizer))
    groups["others"] = [tensor for module in others for tensor in held_by(module)]
    odd = {
        name: sum(_local(t).nbytes for t in tensors if not is_plain(t) and gpu.holds(_local(t)))
        for name, tensors in groups.items()
    }
    plain = {
        name: sum(tensors[0].untyped_storage().nbytes() for tensors in blocks)
        for name, blocks in _blocks(groups, gpu).items()
    }
    optimizer_bytes = plain["optimizer"] + plain["moved_by_itself"]
    buffers = plain["buffers"] + memory.fixed_bytes()
    known = sum(plain.values()) + sum(odd.values()) + memory.fixed_bytes()
    unknown = max(0, allocated - known)
    if estimated:
        expected = memory.expected(model)
        optimizer_bytes, buffers = max(expected[0], optimizer_bytes), max(expected[1], buffers)
    return Holdings(
        weights=plain["weights"] + odd.pop("weights"),
        gradients=plain["gradients"],
        optimizer=optimizer_bytes,
        reference=plain["reference"],
        others=plain["others"] + sum(odd.values()),
        buffers=buffers + unknown + elsewhere,
        estimated=estimated,
    )


def _groups(
    model: nn.Module, optimizer: Any, reference: nn.Module | None, memory: EngineMemory
) -> dict[str, list[Tensor]]:
    """Everything that may lie on the GPU; a storage in two groups belongs to the first."""
    return {
        "weights": held_by(model),
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "optimizer": [*map(_local, _state_of(optimizer)), *memory.with_optimizer()],
        "reference": [] if reference is None else held_by(reference),
        "moved_by_itself": list(memory.moved_by_itself()),
        "buffers": list(memory.fixed()),
    }


def _state_of(optimizer: Any) -> Iterator[Tensor]:
    return _tensors_in(None if optimizer is None else optimizer.state)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(entry)


def _blocks(groups: dict[str, list[Tensor]], gpu: Gpu) -> dict[str, list[list[Tensor]]]:
    """The plain tensors on `gpu`, listed by storage, in the first group that has the storage; with
    the views of it that other groups have, which move with it."""
    plain = {
        name: [t for t in tensors if is_plain(t) and t.untyped_storage().nbytes() and gpu.holds(t)]
        for name, tensors in groups.items()
    }
    views = by_storage(tensor for tensors in plain.values() for tensor in tensors)
    return {
        name: [views.pop(key) for key in by_storage(tensors) if key in views]
        for name, tensors in plain.items()
    }


def _local(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor, as the very tensor object that it holds."""
    with torch.no_grad():
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor
