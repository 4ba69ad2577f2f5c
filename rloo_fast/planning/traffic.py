"""Traffic per optimizer step and GPU, on paper. Letters are those of `memory.py`; M micro-batches.

A collective over n GPUs on tensors of S bytes in all, in bytes that each GPU sends, and receives:

    all-gather, reduce-scatter     (n-1)/n S
    all-reduce                     2 (n-1)/n S          a reduce-scatter and an all-gather

Of these, over the network of k nodes of m GPUs, if every byte enters a node once and the m GPUs
share the work: (k-1)/k S/m, twice for an all-reduce; the others go over NVLink. Seconds: the slower
of the two at full bandwidth. That is a bound from below, and most of it overlaps with computing.

             per step
    fsdp2    gathers  c M (2 P - tail): the lm_head's unit is kept from forward to backward
             reduce-scatter  4 T, M times (or once, see `reduce_every_micro_batch`)
    zero3    gathers  c M (2 P - head) at most: what lies within `LIVE` of the turn is kept
             reduce-scatter  c T, M times
    zero2    all-reduce  c T, M times (that is how DeepSpeed does it), all-gather  c T
    ddp      all-reduce  4 T

A reference that is split: gathers c M P (fsdp2: its lm_head's unit once, as no backward pass drops
it). Weights to the rollout engine, if split: one gather of the policy.
"""

from __future__ import annotations

from dataclasses import dataclass

from .memory import SPLITS_WEIGHTS, Setup

NVLINK = 450e9  # bytes a second and direction, of one H200
NETWORK = 50e9  # 400 Gbit/s a GPU


@dataclass(frozen=True)
class Transfer:
    """What one kind of collective moves in a step: bytes that each GPU sends."""

    what: str
    collective: str  # all-gather | reduce-scatter | all-reduce
    payload: float  # S, over all calls of the step
    nvlink: float
    network: float

    @property
    def sent(self) -> float:
        return self.nvlink + self.network

    @property
    def seconds(self) -> float:
        return max(self.nvlink / NVLINK, self.network / NETWORK)


def transfer(what: str, collective: str, payload: float, gpus: int, per_node: int) -> Transfer:
    """The collective over `gpus` GPUs, `per_node` of them on a node (1: a GPU of each node)."""
    times = 2 if collective == "all-reduce" else 1
    nodes = max(1, gpus // per_node)
    sent = times * (gpus - 1) / gpus * payload
    network = times * (nodes - 1) / nodes * payload / min(per_node, gpus)
    return Transfer(what, collective, payload, sent - network, network)


def traffic(s: Setup) -> list[Transfer]:
    """Every collective of a step with a payload that grows with the model."""
    moves = [*_gathers(s), *_gradients(s)]
    return [move for move in moves if move.sent > 0]


def _gathers(s: Setup) -> list[Transfer]:
    if s.engine not in SPLITS_WEIGHTS:
        return []
    c, times, params, shape = s.width, s.micro_batches, s.params, s.shape
    once = shape.tail if s.engine == "fsdp2" else shape.head  # kept until its gradient is there
    sizes = {
        "forward": c * times * params,
        "backward": c * times * (params - once),
        "reference": c * times * params if s.has_reference else 0,
        "weights to the engine": c * params,
    }
    return [
        transfer(what, "all-gather", size, s.shards, s.gpus_per_node)
        for what, size in sizes.items()
    ]


def _gradients(s: Setup) -> list[Transfer]:
    c, times, m = s.width, s.micro_batches, s.gpus_per_node
    if s.engine == "ddp":
        return [transfer("gradients", "all-reduce", 4 * s.trained, s.gpus, m)]
    if s.engine == "zero2":
        return [
            transfer("gradients", "all-reduce", c * times * s.trained, s.gpus, m),
            transfer("updated weights", "all-gather", c * s.trained, s.gpus, m),
        ]
    if s.engine == "fsdp2" and not s.reduce_every_micro_batch:
        times = 1
    size = (4 if s.engine == "fsdp2" else c) * times * s.trained
    moves = [transfer("gradients", "reduce-scatter", size, s.shards, m)]
    if s.hybrid:
        moves.append(transfer("gradients, across nodes", "all-reduce", size / m, s.nodes, 1))
    return moves
