"""Which engine a configuration gets, and with which settings."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.parallel import Parallel
from rloo_fast.rollout import HFEngine, build, vllm, vllm_server
from rloo_fast.weight_sync import weight_buckets

ACCELERATOR: Any = SimpleNamespace(is_main_process=True, wait_for_everyone=print, autocast=None)


class Recorded:
    def __init__(self, *args, **settings):
        self.args, self.settings = args, settings


def engine_of(tmp_path, monkeypatch, **fields):
    monkeypatch.setattr(vllm, "VLLMEngine", Recorded)
    monkeypatch.setattr(vllm, "check_generation_kwargs", lambda given: None)
    monkeypatch.setattr(vllm_server, "VLLMServer", Recorded)
    args = RLOOConfig(str(tmp_path), use_cpu=True, **fields)
    return build.make_engine(make_model(), make_tokenizer(), args, Parallel(ACCELERATOR))


def test_transformers_is_the_default(tmp_path, monkeypatch):
    assert isinstance(engine_of(tmp_path, monkeypatch), HFEngine)


def test_settings_of_the_engine_in_process(tmp_path, monkeypatch):
    monkeypatch.setattr(RLOOConfig, "world_size", 2)
    engine = engine_of(
        tmp_path, monkeypatch, use_vllm=True, vllm_enable_sleep_mode=True,
        vllm_tensor_parallel_size=2, vllm_max_model_length=64, vllm_gpu_memory_utilization=0.5,
        vllm_model_impl="transformers", vllm_structured_outputs_regex="w1+",
        vllm_engine_kwargs={"max_num_seqs": 3}, seed=7, bf16=True,
    )  # fmt: skip
    settings = engine.settings
    assert settings.pop("tokenizer").eos_token == "<eos>"
    assert settings == {
        "dtype": torch.bfloat16, "sleeps": True, "tensor_parallel_size": 2,
        "max_model_length": 64, "gpu_memory_utilization": 0.5, "model_impl": "transformers",
        "regex": "w1+", "seed": 7, "engine_kwargs": {"max_num_seqs": 3},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({}, "http://0.0.0.0:8000"),
        ({"vllm_server_host": "gpu7", "vllm_server_port": 81}, "http://gpu7:81"),
        ({"vllm_server_base_url": "https://x/v", "vllm_server_port": 81}, "https://x/v"),
    ],
)
def test_settings_of_the_server(fields, url, tmp_path, monkeypatch):
    engine = engine_of(
        tmp_path, monkeypatch, use_vllm=True, vllm_mode="server", vllm_server_timeout=9.0, **fields
    )
    assert engine.args == (url,)
    assert engine.settings["timeout_s"] == 9.0
    assert engine.settings["sleeps"] is False


def test_weights_are_sent_in_buckets(tmp_path):
    args = RLOOConfig(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        weight_sync_bucket_mib=1,
        max_completion_length=8,
    )
    model = make_model(hidden_size=256, intermediate_size=1024)
    trainer = RLOOTrainer(
        model, lambda prompts, **_: [0.0] * len(prompts), args,
        Dataset.from_dict({"prompt": ["w1"] * 8}), processing_class=make_tokenizer(),
    )  # fmt: skip
    sizes = [sum(t.nbytes for _, t in bucket) for bucket in trainer.rollouts.weights()]
    assert len(sizes) > 5
    assert max(sizes) <= 2**20
    assert sum(sizes) == sum(p.nbytes for p in model.parameters())
    assert len(sizes) == len(list(weight_buckets(model, 2**20)))


def test_a_vllm_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.9.2"))
    with pytest.raises(ImportError, match=r"needs vLLM 0\.32 or newer, but 0\.9\.2 is installed"):
        vllm.import_vllm()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.32.0rc1"))
    assert vllm.import_vllm().__version__ == "0.32.0rc1"


def test_a_missing_vllm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r'pip install "rloo-fast\[vllm\]"'):
        vllm.import_vllm()
