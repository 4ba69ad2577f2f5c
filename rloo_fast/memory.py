"""What the trainer moves out of the engine's way while the engine is awake, and back afterwards.

Beside the engine the GPU holds the policy's weights (they stay: the engine is loaded from them),
gradients (None between steps), optimizer state, the reference model and reward models. `plan` says
which of these must go, `Room` moves them. What is moved is whole storages: ties, views, strides and
the tensor objects stay as they are, and every bit comes back.

Of optimizer state that FSDP2 shards, this process' part moves. Other subclasses of Tensor (sharded
weights, of which FSDP2 has further views, and quantised ones) are counted, but stay where they are.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .memory_plan import GIB, Holdings, MemoryPlan, plan
from .storages import by_storage, held_by, is_plain, point, whole_storage

logger = logging.getLogger(__name__)

# CUDA context, kernels' workspaces, weights in flight, what fragmentation loses: not measured
RESERVE = 2 * GIB


class Gpu:
    """The memory of one CUDA device, and copies of bytes to the host and back.

    Copies are only complete after `synchronize`. Host memory is pinned (torch rounds each piece up
    to a power of two) and is kept: after the first round none is allocated.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._spare: dict[int, list[Tensor]] = defaultdict(list)  # by number of bytes

    def to_host(self, block: Tensor) -> Tensor:
        """(n,) uint8 on the device -> the same on the host."""
        spare = self._spare[block.nbytes]
        host = spare.pop() if spare else self.new_host(block.nbytes)
        self.copy(block, host)
        return host

    def to_device(self, host: Tensor) -> Tensor:
        block = self.new_block(host.nbytes)
        self.copy(host, block)
        return block

    def recycle(self, host: Tensor) -> None:
        """Nothing reads `host` any more."""
        self._spare[host.nbytes].append(host)

    # What is CUDA's

    def total(self) -> int:
        return torch.cuda.mem_get_info(self.device)[1]

    def holds(self, tensor: Tensor) -> bool:
        there = tensor.device
        return there.type == self.device.type and self.device.index in (None, there.index)

    def new_host(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def new_block(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Hand back to the device what torch keeps of freed tensors, activations above all."""
        torch.cuda.empty_cache()


class Room:
    """Makes room for an engine that takes `share` of the GPU, and takes it back.

    `optimizer`: the trainer's at the time of the call, None before there is one. `others`: modules
    that stay, such as reward models. What is moved is decided and said at once, with the optimizer
    state estimated, and once more when it is known. Raises ValueError if the engine can not fit.

    `is_made` is true from make() to give_back(), on a CPU too: no optimizer step and no reference
    forward may run then. A checkpoint may be saved at any time: the tensors are whole, on the host;
    give_back() too may be called at any time, and needs the memory on the GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[], Any],
        reference: nn.Module | None,
        device: torch.device,
        *,
        share: float,
        reserve: int = RESERVE,
        others: Iterable[nn.Module] = (),
        say: Callable[[str], None] = logger.info,
        gpu: Gpu | None = None,
    ):
        self.model, self.optimizer, self.reference = model, optimizer, reference
        self.share, self.reserve, self.others, self.say = share, reserve, tuple(others), say
        self.is_made = False
        self._moved: list[tuple[list[Tensor], Tensor]] = []  # tensors of a storage, its host copy
        self._gpu = Gpu(device) if gpu is None and device.type == "cuda" else gpu
        self.plan: MemoryPlan | None = None
        if self._gpu is None:
            say("On a CPU there is nothing to move out of the rollout engine's way.")
        else:
            self._decide(self._gpu)

    def make(self) -> None:
        """Before the engine wakes: what the plan moves goes to the host. Twice is once."""
        if self._gpu is not None and not self.is_made:
            self._move_out(self._gpu)
        self.is_made = True

    def give_back(self) -> None:
        """After the engine slept: exactly what make() moved comes back; without one, nothing."""
        if self._gpu is not None and self.is_made:
            self._move_back(self._gpu)
        self.is_made = False

    def _decide(self, gpu: Gpu) -> MemoryPlan:
        """The plan; measured again until there is optimizer state, said if it changed."""
        known = self.plan
        if known is not None and not known.holdings.estimated:
            return known
        held = measure(self.model, self.optimizer(), self.reference, gpu, others=self.others)
        total = gpu.total()
        self.plan = plan(total, int(self.share * total), held, self.reserve)
        if known is None or known.moved != self.plan.moved:
            self.say(str(self.plan))
        return self.plan

    # Both copy everything before they change anything, so that one that fails leaves all in place

    def _move_out(self, gpu: Gpu) -> None:
        moved = self._decide(gpu).moved
        blocks = _blocks(_groups(self.model, self.optimizer(), self.reference), gpu)
        moving = [tensors for name in moved for tensors in blocks[name]]
        hosts = [gpu.to_host(whole_storage(tensors[0])) for tensors in moving]
        gpu.synchronize()
        self._moved = list(zip(moving, hosts, strict=True))
        for tensors, host in self._moved:
            point(tensors, host)
        gpu.release()

    def _move_back(self, gpu: Gpu) -> None:
        blocks = [gpu.to_device(host) for _, host in self._moved]
        gpu.synchronize()
        for (tensors, host), block in zip(self._moved, blocks, strict=True):
            point(tensors, block)
            gpu.recycle(host)
        self._moved = []


def measure(
    model: nn.Module,
    optimizer: Any,
    reference: nn.Module | None,
    gpu: Gpu,
    *,
    others: Iterable[nn.Module] = (),
) -> Holdings:
    """Bytes on `gpu` now. Without optimizer state: as much as Adam's, 2 x the trained weights."""
    groups = _groups(model, optimizer, reference)
    groups["others"] = [tensor for module in others for tensor in held_by(module)]
    odd = {
        name: sum(_local(t).nbytes for t in tensors if not is_plain(t) and gpu.holds(_local(t)))
        for name, tensors in groups.items()
    }
    plain = {
        name: sum(tensors[0].untyped_storage().nbytes() for tensors in blocks)
        for name, blocks in _blocks(groups, gpu).items()
    }
    estimated = not groups["optimizer"]
    trained = sum(_local(p).nbytes for p in model.parameters() if p.requires_grad)
    return Holdings(
        weights=plain["weights"] + odd.pop("weights"),
        gradients=plain["gradients"],
        optimizer=2 * trained if estimated else plain["optimizer"],
        reference=plain["reference"],
        others=plain["others"] + sum(odd.values()),
        estimated=estimated,
    )


def _groups(
    model: nn.Module, optimizer: Any, reference: nn.Module | None
) -> dict[str, list[Tensor]]:
    """Everything that may lie on the GPU; what is in two groups belongs to the first."""
    return {
        "weights": held_by(model),
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "optimizer": [] if optimizer is None else [_local(t) for t in _tensors_in(optimizer.state)],
        "reference": [] if reference is None else held_by(reference),
    }


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(entry)


def _blocks(groups: dict[str, list[Tensor]], gpu: Gpu) -> dict[str, list[list[Tensor]]]:
    """The plain tensors on `gpu`, those of one storage together, in the first group that has it."""
    seen: set[int] = set()
    found = {}
    for name, tensors in groups.items():
        blocks = by_storage(t for t in tensors if is_plain(t) and gpu.holds(t))
        found[name] = [blocks[key] for key in blocks if key not in seen]
        seen |= blocks.keys()
    return found


def _local(tensor: Any) -> Tensor:
    """This process's part of a tensor that is sharded: the very one that it holds."""
    with torch.no_grad():
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor
