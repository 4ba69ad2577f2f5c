"""What of the trainer's GPU memory must go while the rollout engine is awake: numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Holdings:
    """Bytes on the GPU, every storage counted once."""

    weights: int  # of the policy
    gradients: int
    optimizer: int
    reference: int
    others: int = 0  # can not be moved: reward models; optimizer state or reference, if sharded
    estimated: bool = False  # `optimizer` is: it has no state before the first step


@dataclass(frozen=True)
class MemoryPlan:
    """What stays on the GPU beside the engine and what does not, in bytes; str() is a table."""

    total: int
    engine: int
    reserve: int
    holdings: Holdings
    moved: tuple[str, ...]  # of gradients, optimizer, reference

    @property
    def bytes_moved(self) -> int:
        return sum(getattr(self.holdings, name) for name in self.moved)

    def __str__(self) -> str:
        held = self.holdings
        state = "optimizer state" + (", estimated" if held.estimated else "")
        rows = [
            ("policy weights", held.weights, "stays"),
            ("reward models, not movable", held.others, "stays"),
            ("gradients", held.gradients, self._fate("gradients")),
            (state, held.optimizer, self._fate("optimizer")),
            ("reference model", held.reference, self._fate("reference")),
            ("rollout engine", self.engine, "stays"),
            ("reserve", self.reserve, "stays"),
        ]
        in_use = sum(size for _, size, _ in rows) - self.bytes_moved
        rows.append(("in use", in_use, f"of {self.total / GIB:.2f}"))
        lines = [f"  {label:<28}{size / GIB:>8.2f}  {fate}" for label, size, fate in rows]
        return "\n".join(["GPU memory while the rollout engine is awake, in GiB:", *lines])

    def _fate(self, name: str) -> str:
        return "moved to the host" if name in self.moved else "stays"


def plan(total: int, engine: int, holdings: Holdings, reserve: int) -> MemoryPlan:
    """Moves as few bytes as leave what stays + `engine` + `reserve` <= `total`, all in bytes.

    Where anything must go, gradients do (there should be none), then the smaller of optimizer state
    and reference that is enough, else both. Raises ValueError if everything is not enough.
    """
    free = total - engine - reserve - holdings.weights - holdings.others
    optimizer, reference = holdings.optimizer, holdings.reference
    if holdings.gradients + optimizer + reference <= free:
        return MemoryPlan(total, engine, reserve, holdings, ())
    stays = {  # by what is moved
        (): optimizer + reference,
        ("optimizer",): reference,
        ("reference",): optimizer,
        ("optimizer", "reference"): 0,
    }
    enough = [moved for moved, left in stays.items() if left <= free]
    if not enough:
        raise ValueError(_does_not_fit(total, engine, holdings, reserve))
    moved = max(enough, key=lambda moved: stays[moved])
    return MemoryPlan(total, engine, reserve, holdings, ("gradients", *moved))


def _does_not_fit(total: int, engine: int, holdings: Holdings, reserve: int) -> str:
    most = (total - reserve - holdings.weights - holdings.others) / total
    if most >= 0.01:
        advice = f"Write vllm_gpu_memory_utilization={math.floor(100 * most) / 100:.2f} or less."
    else:
        advice = "No engine fits beside them: take a smaller model, a larger GPU, or a vLLM server."
    return (
        f"The GPU has {total / GIB:.2f} GiB. vllm_gpu_memory_utilization={engine / total:.2f} asks "
        f"for {engine / GIB:.2f} of them, beside {holdings.weights / GIB:.2f} of policy weights, "
        f"{holdings.others / GIB:.2f} that can not be moved (reward models can, with "
        f"reward_model_offload=True) and a reserve of {reserve / GIB:.2f}, "
        f"with optimizer state and reference model moved to the host. {advice}"
    )
