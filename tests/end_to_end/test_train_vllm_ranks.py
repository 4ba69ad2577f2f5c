"""vLLM in two training processes, which split the policy by FSDP2 or ZeRO-3: each with an engine of
its own, or sharing one in two halves."""

from __future__ import annotations

import functools
import importlib.util
import json
import operator
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.end_to_end.test_train_vllm import MODELS
from tests.support.launch import run_worker_processes
from tests.support.tiny import require_vllm

require_vllm()
pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.distributed]


CASES = {  # of two processes; what one process is told for the same
    "FSDP2, two engines": ({"engine": "fsdp2"}, "whole"),
    "ZeRO-3, LoRA, tensor parallel": (
        {"engine": "zero3", "lora": True, "vllm_tensor_parallel_size": 2}, "LoRA",
    ),
}  # fmt: skip
if not (importlib.util.find_spec("deepspeed") or os.environ.get("CI")):
    del CASES["ZeRO-3, LoRA, tensor parallel"]


def launch(out: Path, model_dir: Path, processes: int, cases: dict[str, dict]) -> dict:
    """case: (what was sampled in every step, by all ranks; log history)"""
    sizes = {"per_device_train_batch_size": 16 // processes, "weight_sync_bucket_mib": 1}
    cases = {case: {**sizes, **settings} for case, settings in cases.items()}
    given = [str(out), str(model_dir), json.dumps(cases)]
    done = run_worker_processes("vllm_worker", *given, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for case in cases:
        files = [out / case / f"sampled-{rank}.json" for rank in range(processes)]
        per_rank = [json.loads(file.read_text()) for file in files]
        sampled = [[row for rank in step for row in rank] for step in zip(*per_rank, strict=True)]
        found[case] = sampled, json.loads((out / case / "logs.json").read_text())
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS["llama"]()).save_pretrained(tmp / "model")
    one = launch(tmp / "one", tmp / "model", 1, {"whole": {}, "LoRA": {"lora": True}})
    # one launch each: vLLM's groups of processes cannot be made twice
    two = [
        launch(tmp / case, tmp / "model", 2, {case: settings})
        for case, (settings, _) in CASES.items()
    ]
    return functools.reduce(operator.or_, two, one)


def steps(logs):
    return [row for row in logs if "sampling/logp_diff_max" in row]


@pytest.mark.parametrize("case", ["whole", "LoRA", *CASES])
def test_sampler_and_trainer_agree(case, runs):
    rows = steps(runs[case][1])
    print(case, [(row["sampling/logp_diff_mean"], row["sampling/logp_diff_max"]) for row in rows])
    assert len(rows) == 3
    assert max(row["sampling/logp_diff_max"] for row in rows) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_two_processes_sample_and_learn_what_one_does(case, runs):
    sampled, logs = runs[CASES[case][1]]
    assert runs[case][0] == sampled
    for a, b in zip(steps(runs[case][1]), steps(logs), strict=True):
        for name in ("reward", "loss", "grad_norm", "objective/kl"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name
