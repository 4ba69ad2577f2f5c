"""vLLM in two training processes: each with an engine of its own, or sharing one in two halves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import require_vllm
from test_train_vllm import MODELS
from transformers import AutoModelForCausalLM

require_vllm()
pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def launch(out: Path, model_dir: Path, processes: int, **settings) -> tuple[list, list]:
    """(what was sampled in every step, by all ranks; log history)"""
    out.mkdir()
    settings["per_device_train_batch_size"] = 16 // processes
    worker = [str(HERE / "vllm_worker.py"), str(out), str(model_dir), json.dumps(settings)]
    command = [sys.executable, *worker]
    if processes > 1:
        port = 20000 + os.getpid() % 20000
        nodes = ["--nnodes", "1", "--nproc_per_node", str(processes), "--master_port", str(port)]
        command = [sys.executable, "-m", "torch.distributed.run", *nodes, *worker]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    per_rank = [json.loads((out / f"sampled-{r}.json").read_text()) for r in range(processes)]
    sampled = [[row for rank in step for row in rank] for step in zip(*per_rank, strict=True)]
    return sampled, json.loads((out / "logs.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS["llama"]()).save_pretrained(tmp / "model")
    return {
        "one process": launch(tmp / "one", tmp / "model", 1),
        "two engines": launch(tmp / "two", tmp / "model", 2),
        "tensor parallel": launch(tmp / "tp", tmp / "model", 2, vllm_tensor_parallel_size=2),
    }


def steps(logs):
    return [row for row in logs if "sampling/logp_diff_max" in row]


@pytest.mark.parametrize("case", ["one process", "two engines", "tensor parallel"])
def test_sampler_and_trainer_agree(case, runs):
    rows = steps(runs[case][1])
    print(case, [(row["sampling/logp_diff_mean"], row["sampling/logp_diff_max"]) for row in rows])
    assert len(rows) == 3
    assert max(row["sampling/logp_diff_max"] for row in rows) < 1e-4


@pytest.mark.parametrize("case", ["two engines", "tensor parallel"])
def test_two_processes_sample_and_learn_what_one_does(case, runs):
    assert runs[case][0] == runs["one process"][0]
    for a, b in zip(steps(runs[case][1]), steps(runs["one process"][1]), strict=True):
        for name in ("reward", "loss", "grad_norm", "objective/kl"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name
