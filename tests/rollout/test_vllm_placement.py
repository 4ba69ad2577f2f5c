"""What vLLM is told of processes and GPUs, held against its source."""

from __future__ import annotations

import os
from importlib import util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rloo_fast.rollout.engine import EngineError
from rloo_fast.rollout.vllm import colocate as vllm
from rloo_fast.rollout.vllm import placement as vllm_placement
from rloo_fast.rollout.vllm.placement import launched_as_here, placement, uses_expandable_segments
from tests.support.tiny import make_model
from tests.support.vllm_source import fields_of, functions, source, vllm_folder

VARIABLES = vllm_placement.ALLOCATOR_VARIABLES


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """As on a machine whose processes see `gpus.count` GPUs, under a launcher; `gpus.started`: the
    environment and arguments that vLLM was started with."""
    seen = SimpleNamespace(count=8, device=3, rank=5, world=8, started=[])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen.count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: seen.device)
    monkeypatch.setattr(vllm_placement.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(vllm_placement.dist, "get_world_size", lambda: seen.world)
    monkeypatch.setattr(vllm_placement.dist, "get_rank", lambda: seen.rank)
    for name in (*VARIABLES, "RANK", "LOCAL_RANK", "NCCL_GRAPH_REGISTER"):
        monkeypatch.delenv(name, raising=False)

    class LLM:
        def __init__(self, **settings):
            seen.started.append((dict(os.environ), settings))
            if seen.count < 1:
                raise RuntimeError("no GPU")

        def sleep(self, level):
            return

        def apply_model(self, function):
            return [None]

        llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(model_config=SimpleNamespace(quantization=None))
        )

    fake = SimpleNamespace(LLM=LLM, envs=SimpleNamespace(VLLM_CACHE_ROOT=str(tmp_path)))
    monkeypatch.setattr(vllm, "import_vllm", lambda: fake)
    monkeypatch.setattr(vllm, "runs_on_cpu", lambda: False)
    monkeypatch.setattr(vllm, "tensor_parallel_group", lambda size: None)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: torch.no_grad())
    return seen


def start(**settings):
    return vllm.VLLMEngine(make_model(), dtype=torch.bfloat16, sleeps=True, **settings)


# Expandable segments

CONFIGURATIONS = [
    {},
    {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
    {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512, expandable_segments:True"},
    {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False,max_split_size_mb:512"},
    {"PYTORCH_ALLOC_CONF": "expandable_segments:False",
     "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    {"PYTORCH_ALLOC_CONF": "", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    {"PYTORCH_HIP_ALLOC_CONF": "expandable_segments:1"},
    {"PYTORCH_ALLOC_CONF": "no_expandable_segments:True"},
]  # fmt: skip


@pytest.mark.parametrize("variables", CONFIGURATIONS)
def test_torchs_setting_is_read_as_vllm_reads_it(variables, monkeypatch):
    path = vllm_folder() / "device_allocator" / "alloc_conf.py"
    spec: Any = util.spec_from_file_location("vllm_alloc_conf", path)
    theirs: Any = util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    assert theirs.ALLOC_CONF_ENV_VARS == VARIABLES
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert uses_expandable_segments() is theirs.expandable_segments_enabled_from_env()


def test_a_setting_changed_while_torch_runs_counts(monkeypatch):
    live = {"allocator_settings": {"expandable_segments": True}}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: live)
    assert uses_expandable_segments()
    live["allocator_settings"]["expandable_segments"] = False
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert not uses_expandable_segments()


@pytest.mark.parametrize("name", VARIABLES[:2])
def test_engines_of_several_gpus_use_nccls_all_reduce_beside_expandable_segments(
    name, gpus, monkeypatch
):
    monkeypatch.setenv(name, "expandable_segments:True")
    start(tensor_parallel_size=2)
    start(tensor_parallel_size=1)
    of_two, of_one = (settings for _, settings in gpus.started)
    assert of_two["disable_custom_all_reduce"] is True
    assert "disable_custom_all_reduce" not in of_one


def test_vllms_own_all_reduce_stays_where_it_works(gpus):
    start(tensor_parallel_size=2)
    assert "disable_custom_all_reduce" not in gpus.started[0][1]


def test_asking_for_what_would_kill_the_processes_is_refused(gpus, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    asked = {"disable_custom_all_reduce": False}
    with pytest.raises(ValueError, match="expandable_segments:True"):
        start(tensor_parallel_size=2, engine_kwargs=asked)
    start(tensor_parallel_size=1, engine_kwargs=asked)
    assert len(gpus.started) == 1


# Processes


def test_a_process_that_sees_one_gpu_is_local_rank_0_while_vllm_starts(gpus, monkeypatch):
    gpus.count, gpus.device = 1, 0
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setenv("RANK", "5")
    start()
    environment, _ = gpus.started[0]
    assert (environment["LOCAL_RANK"], environment["RANK"]) == ("0", "5")
    assert int(environment["LOCAL_RANK"]) < gpus.count  # vLLM asserts this
    assert (os.environ["LOCAL_RANK"], os.environ["RANK"]) == ("5", "5")


def test_the_gpu_is_the_trainers_and_what_was_not_set_is_not_set_afterwards(gpus):
    start()
    environment, settings = gpus.started[0]
    assert (environment["LOCAL_RANK"], environment["RANK"]) == ("3", "5")
    assert settings["distributed_executor_backend"] == "external_launcher"
    assert "LOCAL_RANK" not in os.environ
    assert "RANK" not in os.environ


def test_an_error_of_vllm_leaves_the_environment_as_it_was(gpus, monkeypatch):
    gpus.count = 0
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(EngineError):
        start()
    assert os.environ["LOCAL_RANK"] == "5"
    assert "RANK" not in os.environ


def test_a_single_process_is_not_made_part_of_a_launch(gpus):
    gpus.world = 1
    start()
    environment, settings = gpus.started[0]
    assert "LOCAL_RANK" not in environment
    assert "distributed_executor_backend" not in settings


def test_gpus_that_a_process_cannot_see_are_not_looked_for(gpus):
    gpus.count, gpus.device = 1, 0
    start(tensor_parallel_size=2)
    assert gpus.started[0][1]["disable_custom_all_reduce"] is True


def test_on_cpus_a_local_rank_that_is_there_stays(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with launched_as_here(on_cpu=True):
        assert os.environ["LOCAL_RANK"] == "1"
    monkeypatch.delenv("LOCAL_RANK")
    with launched_as_here(on_cpu=True):
        assert os.environ["LOCAL_RANK"] == "5"


def test_vllm_still_takes_the_local_rank_for_the_number_of_a_visible_gpu():
    assert 'int(os.environ["LOCAL_RANK"])' in source("v1/executor/uniproc_executor.py")
    worker = source("v1/worker/gpu_worker.py")
    assert "assert self.local_rank < torch.accelerator.device_count()" in worker


# CUDA graphs


def test_cuda_graphs_leave_the_gpu_while_the_engine_sleeps(gpus, monkeypatch):
    start()
    assert gpus.started[0][1]["sleep_mode_offload_cudagraph"] is True
    awake = placement(on_cpu=False, sleeps=False, tensor_parallel_size=1)
    on_cpu = placement(on_cpu=True, sleeps=True, tensor_parallel_size=1)
    assert "sleep_mode_offload_cudagraph" not in awake | on_cpu


def test_graphs_with_nccl_calls_stay_unless_nccl_was_told_not_to_pin_them(gpus, monkeypatch):
    start(tensor_parallel_size=2)
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    start(tensor_parallel_size=2)
    kept, moved = (settings for _, settings in gpus.started)
    assert "sleep_mode_offload_cudagraph" not in kept
    assert moved["sleep_mode_offload_cudagraph"] is True


def test_vllm_moves_graphs_as_is_assumed_here():
    assert "NCCL_GRAPH_REGISTER" in source("config/vllm.py")
    # they go at every level of sleep, and come back with whatever is woken first
    assert '"cudagraph"' in functions("device_allocator/sleep_mode_backend.py", "suspend")
    assert "cudagraph" not in source("device_allocator/__init__.py").split("DEFERRABLE_TAGS")[1]
    wake = functions("device_allocator/cumem.py", "wake_up")
    assert "data.tag not in DEFERRABLE_TAGS" in wake


# Arguments


def test_vllm_knows_every_argument_that_it_is_given(gpus):
    gpus.count, gpus.device = 1, 0
    start(tensor_parallel_size=1)
    start(tensor_parallel_size=2)
    known = fields_of("engine/arg_utils.py", "EngineArgs")
    for _, settings in gpus.started:
        assert settings.keys() <= known.keys()
    assert placement(on_cpu=True, sleeps=False, tensor_parallel_size=1).keys() <= known.keys()


def test_vllms_defaults_are_those_that_ours_replace():
    known = fields_of("engine/arg_utils.py", "EngineArgs")
    assert known["max_num_seqs"] == "None"  # then 1024 or 256, by the GPU's size
    assert "1024" in functions("engine/arg_utils.py", "get_batch_defaults")
    model = fields_of("config/model.py", "ModelConfig")
    assert model["sleep_mode_offload_cudagraph"] == "False"
    assert fields_of("config/parallel.py", "ParallelConfig")["disable_custom_all_reduce"] == "False"
