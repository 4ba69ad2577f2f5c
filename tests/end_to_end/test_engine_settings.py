"""Two gloo processes equal one whatever the engine prefetches, keeps whole and shards again.

    python -m tests.end_to_end.test_engine_settings
        prints the table: engine, its settings, layout, full or LoRA -> equal to one process or not

The model is tied, samples its own completions, and is evaluated between two steps: passes with and
without gradients come before and after each other, and more than once, as an engine may go by what
it has recorded of the one before.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import pytest
import torch

from tests.end_to_end.test_train_engines import BOUNDS, differences, save_models
from tests.support.cpu_engines import require_deepspeed
from tests.support.launch import run_worker_processes

SMALL = {"stage3_prefetch_bucket_size": 500}  # of some 20,000 parameters
SPLIT = {"stage3_param_persistence_threshold": 0}
NEAR = {"stage3_max_reuse_distance": 0}
# (engine, settings) by their name in the table
SETTINGS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "ZeRO-1": ("zero1", {}),
    "ZeRO-2": ("zero2", {}),
    "ZeRO-3, bucket default, threshold default": ("zero3", {}),
    "ZeRO-3, bucket small, threshold default": ("zero3", SMALL),
    "ZeRO-3, bucket default, threshold 0": ("zero3", SPLIT),
    "ZeRO-3, bucket small, threshold 0": ("zero3", SPLIT | SMALL),
    "ZeRO-3, bucket small, threshold 0, no reuse": ("zero3", SPLIT | SMALL | NEAR),
    "recipe:deepspeed/zero3": ("recipe:deepspeed/zero3", None),
    "FSDP2, reshard_after_forward": ("fsdp2", {"reshard_after_forward": True}),
    "FSDP2, whole until the backward pass": ("fsdp2", {"reshard_after_forward": False}),
}
LAYOUTS = ("shared_prefix", "packed", "padded")
KINDS = {"full": False, "LoRA": True}
COLUMNS = tuple(itertools.product(KINDS, LAYOUTS))
RUN: dict[str, Any] = {
    "model": "tied", "sample": True, "num_generations": 2, "max_tokens_per_micro_batch": 30,
    "beta": 0.1, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "evaluate": False,
    "gradient_checkpointing": True,  # LoRA's inputs then need gradients, from the embedding on
}  # fmt: skip
TIMEOUT_S = 900


def run(
    tmp: Path, processes: int, name: str | None, columns: tuple[tuple[str, str], ...]
) -> list[Any]:
    """Of every column what engine_worker saved, or why there is nothing."""
    engine, more = SETTINGS[name] if name else (None, None)
    size = {"per_device_train_batch_size": 4 // processes}
    size["per_device_eval_batch_size"] = 2 // processes  # several batches
    cases = [
        {**RUN, **size, "engine": engine, "more": more, "lora": KINDS[kind], "layout": layout}
        for kind, layout in columns
    ]
    out = tmp / (name or "one").replace(":", " ").replace("/", " ")
    out.mkdir()
    given = [str(out), str(tmp / "models"), json.dumps(cases)]
    with contextlib.suppress(TimeoutExpired):  # what was not saved is told apart below
        run_worker_processes("settings_worker", *given, processes=processes, timeout_s=TIMEOUT_S)
    return [result(out, i) for i in range(len(cases))]


def result(out: Path, i: int) -> Any:
    if (out / f"{i}.pt").exists():
        return torch.load(out / f"{i}.pt")
    failed = out / f"{i}.txt"
    return failed.read_text() if failed.exists() else "no result"


def verdict(one: Any, two: Any) -> str:
    """ "equal", or what is not."""
    if isinstance(two, str):
        return two
    found, bounds = differences(one, two), BOUNDS["float32"]
    off = [f"{name} {found[name]:.0e}" for name in bounds if not found[name] <= bounds[name]]
    return "off: " + ", ".join(off) if off else "equal"


@pytest.mark.slow
@pytest.mark.distributed
def test_the_recipe_s_small_buckets_equal_one_process(tmp_path):
    require_deepspeed()
    save_models(tmp_path / "models")
    columns = (("full", "shared_prefix"),)
    (one,) = run(tmp_path, 1, None, columns)
    (two,) = run(tmp_path, 2, "recipe:deepspeed/zero3", columns)
    assert verdict(one, two) == "equal"


def print_table() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        save_models(tmp / "models")
        ones = run(tmp, 1, None, COLUMNS)
        print(f"{'two processes':44}", *(f"{kind + ' ' + layout:>19}" for kind, layout in COLUMNS))
        reasons: list[str] = []
        for name in SETTINGS:
            twos = run(tmp, 2, name, COLUMNS)
            cells = []
            for one, two in zip(ones, twos, strict=True):
                found = verdict(one, two)
                if found != "equal":
                    reasons += [found] if found not in reasons else []
                    found = f"NOT ({reasons.index(found) + 1})"
                cells.append(found)
            print(f"{name:44}", *(f"{cell:>19}" for cell in cells), flush=True)
        for number, reason in enumerate(reasons, 1):
            print(f"({number}) {reason[:200]}")


if __name__ == "__main__":
    print_table()
