"""What must leave the GPU while the rollout engine is awake: a plan from numbers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

GIB = 1 << 30
LEAST_SHARE, MOST_SHARE = 0.3, 0.85  # of the GPU's memory, for an engine that nobody gave one


@dataclass(frozen=True)
class Holdings:
    """Bytes on the GPU, every storage counted once."""

    weights: int  # of the policy
    gradients: int
    optimizer: int  # its state, and what the training engine moves with it
    reference: int
    others: int = 0  # not movable: reward models; optimizer state or reference, if sharded
    buffers: int = 0  # not movable: of the training engine, and whatever else is in use
    estimated: bool = False  # `optimizer`, `buffers` are estimates: the first step makes them

    @property
    def fixed(self) -> int:
        """What stays whatever is moved."""
        return self.weights + self.others + self.buffers

    @property
    def total(self) -> int:
        return self.fixed + self.gradients + self.optimizer + self.reference


@dataclass(frozen=True)
class MemoryPlan:
    """What stays on the GPU beside the engine and what moves, in bytes; str() is a table."""

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
            ("training engine's buffers", held.buffers, "stays"),
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
    """Moves the fewest bytes with which what stays + `engine` + `reserve` <= `total`, all in bytes.

    Where anything must move, gradients do (there should be none), then the smaller of optimizer
    state and reference that frees enough, else both. Raises ValueError if moving all of them does
    not free enough.
    """
    free = total - engine - reserve - holdings.fixed
    optimizer, reference = holdings.optimizer, holdings.reference
    if holdings.gradients + optimizer + reference <= free:
        return MemoryPlan(total, engine, reserve, holdings, ())
    stays = {  # what is moved -> bytes of the movable that stay
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


def best_share(total: int, holdings: Holdings, reserve: int, need: int | None) -> float:
    """The share of the GPU for an engine that sleeps, of which nobody said how large it is to be.

    As much as it needs (None: as much as it can get), but not less than LEAST_SHARE, which is the
    share of an engine that does not sleep; and not more than fits beside what stays when all that
    can move has moved, or than MOST_SHARE. In steps of 0.01.
    """
    needed = MOST_SHARE if need is None else max(LEAST_SHARE, need / total)
    fits = (total - reserve - holdings.fixed) / total
    if fits < LEAST_SHARE:
        return LEAST_SHARE  # for `plan` to say what is in its way
    return min(math.ceil(100 * min(needed, 1)), math.floor(100 * min(fits, MOST_SHARE))) / 100


def _does_not_fit(total: int, engine: int, holdings: Holdings, reserve: int) -> str:
    most = (total - reserve - holdings.fixed) / total
    if most >= 0.01:
        advice = f"Write vllm_gpu_memory_utilization={math.floor(100 * most) / 100:.2f} or less."
    else:
        advice = "No engine fits beside them: take a smaller model, a larger GPU, or a vLLM server."
    return (
        f"The GPU has {total / GIB:.2f} GiB. vllm_gpu_memory_utilization={engine / total:.2f} asks "
        f"for {engine / GIB:.2f} of them, beside {holdings.weights / GIB:.2f} of policy weights, "
        f"{holdings.others / GIB:.2f} that can not be moved (reward models can, with "
        f"reward_model_offload=True), {holdings.buffers / GIB:.2f} of the training engine's "
        f"buffers and of other processes, and a reserve of {reserve / GIB:.2f}, "
        f"with optimizer state and reference model moved to the host. {advice}"
    )
