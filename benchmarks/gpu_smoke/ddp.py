"""(c) Two processes of DDP on one GPU, over gloo: NCCL refuses two processes on one device.

The part's own process is rank 0; `python -m benchmarks.gpu_smoke.ddp STORE [--dry]` is rank 1.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from rloo_fast.distributed.memory import BucketMemory
from rloo_fast.offload.engine_room import measure

from .device import GIB, Cuda, Host
from .part import Smoke
from .shapes import checksum, make_model

TIMEOUT = datetime.timedelta(seconds=240)  # two starts of Python on a loaded machine


def run(smoke: Smoke) -> None:
    store = smoke.folder / "ddp-store"
    store.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"{__package__}.ddp", str(store)]
    peer = subprocess.Popen([*command, *(["--dry"] if smoke.dry else [])])
    try:
        found = train(0, str(store), smoke.device)
        smoke.record(**found)
        if peer.wait(TIMEOUT.total_seconds()) != 0:
            raise RuntimeError(f"the second process ended with {peer.returncode}")
    finally:
        peer.kill()
        peer.wait()


def train(rank: int, store: str, on: Cuda | Host) -> dict[str, float | None]:
    """Two steps; the figures as this process sees them."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # both are on this machine
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=TIMEOUT
    )
    try:
        model = make_model("0.5b" if on.is_cuda else "tiny", on.device)
        with on.allocations() as left:
            wrapped = DistributedDataParallel(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
            torch.manual_seed(rank)
            for _ in range(2):
                ids = torch.randint(model.config.vocab_size, (1, 16), device=on.device)
                wrapped(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        gpu, memory = on.gpu(), BucketMemory(lambda: wrapped, 2)
        held = measure(model, optimizer, None, gpu, memory=memory)
        weights = sum(p.nbytes for p in model.parameters())
        mine = (on.reserved(), [checksum(p) for p in model.parameters()])
        both: list[Any] = [None, None]
        dist.all_gather_object(both, mine)
        other = both[1 - rank][0]
        found = {
            "buckets_gib": memory.fixed_bytes() / GIB,
            "buckets_over_weights": memory.fixed_bytes() / weights,
            "counted_over_allocated": (held.total - held.weights) / left.bytes
            if left.bytes
            else None,
            "replicas_differ": int(both[0][1] != both[1][1]),
            "other_process_seen": gpu.elsewhere() / other if other else None,
        }
        dist.barrier()  # nobody leaves before the other has looked
        return found
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    train(1, args.store, Host() if args.dry else Cuda())
