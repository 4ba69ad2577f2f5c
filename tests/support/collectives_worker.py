"""One of several gloo processes that call every collective (torchrun).

python tests/support/collectives_worker.py OUT_FILE
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from rloo_fast.distributed.collectives import (
    any_process,
    gather_objects,
    gather_rows,
)


def main(out: str) -> None:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    flags = {"none": False, "first": rank == 0, "last": rank == 1, "all": True}
    rows = {"number": torch.tensor([2 * rank, 2 * rank + 1]), "half": torch.tensor([0.5, rank])}
    found = {
        "any": {name: any_process(accelerator, flag) for name, flag in flags.items()},
        "objects": gather_objects(accelerator, {"rank": rank, "texts": ["x"] * rank}),
        "rows": {name: column.tolist() for name, column in gather_rows(accelerator, rows).items()},
    }
    # as where the processes' own backend is one of the devices, such as NCCL
    on_gpu: Any = SimpleNamespace(num_processes=2, device=torch.device("cuda", rank))
    found["on_gpu"] = {
        "any": {name: any_process(on_gpu, flag) for name, flag in flags.items()},
        "rows": {name: column.tolist() for name, column in gather_rows(on_gpu, rows).items()},
    }
    both = [None] * dist.get_world_size()
    dist.all_gather_object(both, found)
    if rank == 0:
        Path(out).write_text(json.dumps(both))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo of torch 2.13 sometimes aborts in its destructor, after correct results


if __name__ == "__main__":
    main(sys.argv[1])
