"""(a) vLLM's allocator for sleep mode beside live tensors of a trainer.

Every cycle: sleep, at level 1 (weights to the host) and 2 (all dropped) in turn; the trainer takes
and frees memory and changes its tensors; wake the weights, which are loaded again after level 2;
wake the cache; replay the CUDA graph that was captured at the start.
"""

from __future__ import annotations

import gc
from typing import NamedTuple

import torch

from .device import GIB
from .part import Smoke


class Sizes(NamedTuple):
    cycles: int
    num_weights: int
    weight: int  # float32 numbers in each
    cache: int


SIZES = {False: Sizes(20, 8, 16 << 20, 512 << 20), True: Sizes(4, 3, 1 << 10, 1 << 12)}  # by dry


def run(smoke: Smoke) -> None:
    on, sizes = smoke.device, SIZES[smoke.dry]
    torch.manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(sizes.weight, device=on.device)

    trainer = [noise() for _ in range(sizes.num_weights)]
    kept = [_host_copy(tensor) for tensor in trainer]
    smoke.record(expandable_segments=int(on.uses_expandable_segments()))
    pool = on.sleep_pool()
    with pool.use_memory_pool("weights"):
        weights = [torch.empty(sizes.weight, device=on.device) for _ in range(sizes.num_weights)]
    with pool.use_memory_pool("kv_cache"):
        cache = torch.empty(sizes.cache, device=on.device)
    of_pool = [*weights, cache]
    addresses = [tensor.data_ptr() for tensor in of_pool]

    def load() -> list[torch.Tensor]:
        for weight in weights:
            weight.copy_(noise())
        return [_host_copy(weight) for weight in weights]

    start, out = noise(), noise()

    def work(target: torch.Tensor = out) -> None:
        target.copy_(start)
        for weight in weights:
            target.mul_(weight).add_(cache[: sizes.weight])

    loaded = load()
    cache.fill_(0.5)
    replay = on.capture(work)
    moved = wrong = lost = changed = done = 0
    first_used = freed_share = None
    for cycle in range(sizes.cycles):
        level = 1 + cycle % 2
        on.release()
        used = on.used()
        pool.sleep(offload_tags=("weights",) if level == 1 else ())
        asleep = on.used()
        if used is not None and asleep is not None:
            share = (used - asleep) / sum(tensor.nbytes for tensor in of_pool)
            freed_share = share if freed_share is None else min(share, freed_share)
        beside = torch.full((sizes.cache // 2,), 7.0, device=on.device)  # where the cache was
        for tensor, host in zip(trainer, kept, strict=True):
            tensor.add_(beside[0])
            host.add_(7.0)
        del beside
        on.release()
        pool.wake_up(["weights"])
        if level == 2:
            loaded = load()
        lost += sum(not torch.equal(w.cpu(), x) for w, x in zip(weights, loaded, strict=True))
        pool.wake_up(["kv_cache"])
        cache.fill_(cycle / 7)
        expected = torch.empty_like(out)
        work(expected)
        out.fill_(float("nan"))
        replay()
        on.synchronize()
        wrong += not torch.equal(out, expected)
        moved += [tensor.data_ptr() for tensor in of_pool] != addresses
        changed += sum(not torch.equal(t.cpu(), k) for t, k in zip(trainer, kept, strict=True))
        del expected
        gc.collect()
        on.release()
        done, last_used = cycle + 1, on.used()
        first_used = last_used if first_used is None else first_used
        leaked = None if last_used is None or first_used is None else last_used - first_used
        smoke.record(
            cycles=done,
            addresses_changed=moved,
            replays_wrong=wrong,
            weights_lost=lost,
            trainer_tensors_changed=changed,
            freed_share=freed_share,
            leaked_gib=None if leaked is None else leaked / GIB,
        )


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", copy=True)
