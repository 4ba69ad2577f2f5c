"""With images, two gloo processes equal one: weights, loss and gradient norm, by training engine.

`python -m tests.end_to_end.test_image_engines` prints the table.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

from tests.end_to_end.test_train_engines import differences
from tests.support.cpu_engines import require_deepspeed
from tests.support.launch import run_worker_processes
from tests.support.vision import make_vision_model

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
# steps of several micro-batches, of which some have no image; LLaVA's tower ends in a layer that
# nobody looks at
CASES = {
    "qwen2_5_vl, shared_prefix": dict(
        family="qwen2_5_vl", layout="shared_prefix", max_tokens_per_micro_batch=40
    ),
    "qwen2_5_vl, padded": dict(family="qwen2_5_vl", layout="padded", beta=0.0),
    "llava, shared_prefix": dict(
        family="llava", layout="shared_prefix", gradient_checkpointing=True
    ),
}
PAIRS = [
    ("qwen2_5_vl, shared_prefix", "ddp"),
    ("qwen2_5_vl, shared_prefix", "fsdp2"),
    ("qwen2_5_vl, shared_prefix", "zero3"),
    ("qwen2_5_vl, padded", "ddp"),
    ("llava, shared_prefix", "ddp"),
]
BOUNDS = {"weights": 5e-6, "change": 1e-4, "loss": 1e-6, "grad_norm": 1e-5}


def launch(out: Path, models: Path, processes: int, cases: list[dict]) -> list[dict]:
    out.mkdir()
    given = [{**case, "per_device_train_batch_size": 4 // processes} for case in cases]
    arguments = [str(out), str(models), json.dumps(given)]
    done = run_worker_processes("vision_worker", *arguments, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = [torch.load(out / f"{i}.pt") for i in range(len(cases))]
    for name in {name for run in runs for name in run["weights"] if name.endswith("k_proj.bias")}:
        for run in runs:
            run["weights"].pop(name, None)  # no gradient but rounding, on a bias that starts at 0
    return runs


def run_all(tmp: Path) -> dict[tuple[str, str], dict[str, float]]:
    for family in {case["family"] for case in CASES.values()}:
        make_vision_model(family).save_pretrained(tmp / "models" / family)
    ones = dict(zip(CASES, launch(tmp / "one", tmp / "models", 1, [*CASES.values()]), strict=True))
    settings = [{**CASES[case], "engine": engine} for case, engine in PAIRS]
    twos = launch(tmp / "two", tmp / "models", 2, settings)
    return {pair: differences(ones[pair[0]], two) for pair, two in zip(PAIRS, twos, strict=True)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    require_deepspeed()
    return run_all(tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize("pair", PAIRS, ids=map(", ".join, PAIRS))
def test_two_processes_train_what_one_does(pair, found):
    assert all(found[pair][name] <= bound for name, bound in BOUNDS.items()), found[pair]


def print_table() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(Path(folder))
    print(f"{'engine':6}  {'case':28}", *(f"{name:>9}" for name in BOUNDS))
    for (case, engine), values in found.items():
        print(f"{engine:6}  {case:28}", *(f"{values[name]:9.1e}" for name in BOUNDS))


if __name__ == "__main__":
    print_table()
