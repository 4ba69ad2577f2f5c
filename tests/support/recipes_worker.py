"""One of two gloo processes: `rloo-fast train` under FSDP2 as `accelerate launch` would set it up,
then under DeepSpeed, each into a directory of its own.

python -m tests.support.recipes_worker OUT_DIR ENVIRONMENT_JSON ARGUMENT ...      (under torchrun)
"""

import json
import os
import sys

import torch

import tests.support.no_curves  # noqa: F401
from rloo_fast.cli import main
from tests.support.cpu_engines import import_deepspeed, upgrade_cpus_to_fsdp


def train(out: str, *arguments: str) -> None:
    status = main(["train", *arguments, "--output_dir", out])
    assert status == 0, (out, status)


def run(out: str, environment: dict, arguments: list[str]) -> None:
    import_deepspeed()
    upgrade_cpus_to_fsdp()
    torch.distributed.destroy_process_group = lambda *_: None  # the second run needs it as well
    os.environ.update(environment)
    train(f"{out}/fsdp2", *arguments)
    for name in environment:
        del os.environ[name]
    train(f"{out}/zero3", *arguments, "--deepspeed", "recipe:deepspeed/zero3")
    sys.stdout.flush()
    os._exit(0)  # gloo of torch 2.13 sometimes aborts in its destructor, after correct results


if __name__ == "__main__":
    run(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:])
