"""An engine that cannot be used as it was launched is refused."""

from __future__ import annotations

import pytest
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.distributed.choose import check_processes
from rloo_fast.distributed.fsdp2 import FSDP2
from tests.support.tiny import make_model


def config(folder, **fields):
    return RLOOConfig(str(folder), use_cpu=True, report_to="none", **fields)


def test_fsdp_on_cpus_is_refused_before_a_model_is_loaded(tmp_path):
    """accelerate would train unsharded without a word."""
    args = config(tmp_path, fsdp=True, fsdp_config={"version": 2})
    with pytest.raises(ValueError, match=r"0 of 1 on CPUs.*--deepspeed recipe:deepspeed/zero3"):
        RLOOTrainer("no-such/model", "exact_match", args)


def test_fsdp_of_accelerate_launch_is_refused_on_cpus_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="take the configuration accelerate/ddp"):
        RLOOTrainer("no-such/model", "exact_match", config(tmp_path))


@pytest.mark.parametrize(
    "launched",
    [
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"RANK": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    ],
)
def test_processes_that_accelerate_does_not_know_of_are_refused(launched, monkeypatch):
    """Two of them would train two models into one directory, and end well."""
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"process 0 of 1: .* set use_cpu=True \(--use_cpu\)"):
        check_processes(num_processes=1, process_index=0)


@pytest.mark.parametrize(
    "launched",
    [
        {},
        {"WORLD_SIZE": "2", "RANK": "1"},
        {"WORLD_SIZE": "2", "RANK": "1", "OMPI_COMM_WORLD_SIZE": "1"},  # torchrun within mpirun
        {"WORLD_SIZE": "", "RANK": "-1"},
    ],
)
def test_processes_that_accelerate_knows_of_are_not(launched, monkeypatch):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    check_processes(num_processes=2, process_index=1)


def test_a_config_is_refused_in_one_of_two_processes_that_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 says"):
        RLOOConfig(str(tmp_path), report_to="none")


def test_evaluating_before_the_engine_holds_the_model_is_refused(tmp_path, tokenizer):
    args = RLOOConfig(
        str(tmp_path), use_cpu=True, report_to="none", max_completion_length=4,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "w1", "answer": "w2"}] * 8)
    trainer = RLOOTrainer(
        make_model(), "exact_match", args, train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.parallel = FSDP2(trainer.accelerator)
    with pytest.raises(ValueError, match="set eval_on_start=True"):
        trainer.evaluate()
