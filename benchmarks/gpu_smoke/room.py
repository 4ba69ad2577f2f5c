"""(b) `EngineRoom` on a model of 1.5B parameters: float32 policy, Adam, bfloat16 reference."""

from __future__ import annotations

import statistics
import time

import torch

from rloo_fast.offload.engine_room import OF_THE_DRIVER, EngineRoom, measure

from .device import GIB
from .part import Smoke
from .shapes import checksum, make_model

ROUNDS = 4
SHARE = 0.3  # of the GPU, for the engine that is not there


def run(smoke: Smoke) -> None:
    on, shape = smoke.device, "tiny" if smoke.dry else "1.5b"
    base = on.used()
    policy = make_model(shape, on.device)
    reference = make_model(shape, on.device).bfloat16().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5, fused=on.is_cuda)
    ids = torch.randint(policy.config.vocab_size, (2, 32), device=on.device)
    with torch.autocast(on.device.type, torch.bfloat16):
        policy(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    on.release()

    state = [t for entry in optimizer.state.values() for t in entry.values()]
    tensors = [*policy.parameters(), *reference.parameters(), *filter(torch.is_tensor, state)]
    before = [checksum(tensor) for tensor in tensors]
    on.release()
    gpu = on.gpu()
    held = measure(policy, optimizer, reference, gpu)
    smoke.record(unattributed_gib=(gpu.allocated() - held.total) / GIB if on.is_cuda else None)
    # leaves half a reference of room, so that both must move
    fixed = max(held.fixed, gpu.allocated() - held.optimizer - held.reference)
    fixed += max(0, gpu.elsewhere() - OF_THE_DRIVER)
    reserve = gpu.total() - int(SHARE * gpu.total()) - fixed - held.reference // 2
    room = EngineRoom(
        policy, lambda: optimizer, reference, on.device, share=SHARE, reserve=reserve, gpu=gpu,
        say=print,
    )  # fmt: skip
    assert room.plan is not None
    moved = room.plan.bytes_moved
    smoke.record(moved_gib=moved / GIB, moved_share=moved / (held.optimizer + held.reference))

    out_s, back_s, unaccounted = [], [], None
    for _ in range(ROUNDS):
        out_s.append(_seconds(smoke, room.make))
        used = on.used()
        if used is not None and base is not None:
            unaccounted = (used - base - (held.total - moved)) / GIB
        back_s.append(_seconds(smoke, room.give_back))
        smoke.record(unaccounted_gib=unaccounted, first_out_s=out_s[0])
    smoke.record(
        tensors_changed=sum(checksum(t) != was for t, was in zip(tensors, before, strict=True)),
        # on a host the copies are too small to say anything
        out_gb_per_s=moved / 1e9 / statistics.median(out_s[1:]) if on.is_cuda else None,
        back_gb_per_s=moved / 1e9 / statistics.median(back_s[1:]) if on.is_cuda else None,
    )


def _seconds(smoke: Smoke, move) -> float:
    smoke.device.synchronize()
    start = time.perf_counter()
    move()
    smoke.device.synchronize()
    return time.perf_counter() - start
