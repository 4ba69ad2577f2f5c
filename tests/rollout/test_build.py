"""Which engine a configuration gets, and with which settings."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.config.rollout_engine import engine_name
from rloo_fast.config.shares import given_share
from rloo_fast.distributed import TrainingEngine
from rloo_fast.rollout import EngineSettings, HFEngine, find_engine
from rloo_fast.rollout.build import make_engine
from rloo_fast.rollout.engine_need import WORKSPACE, needed_bytes
from rloo_fast.rollout.settings import InProcessSettings
from rloo_fast.rollout.vllm import colocate as vllm
from rloo_fast.rollout.vllm import package as vllm_package
from rloo_fast.rollout.vllm import server as vllm_server
from rloo_fast.weight_sync.buckets import weight_buckets
from tests.support.tiny import make_model, make_tokenizer

ACCELERATOR: Any = SimpleNamespace(
    is_main_process=True, wait_for_everyone=print, autocast=None, device=torch.device("cpu")
)


def recorded(self, *args, **settings):
    """In place of an engine's __init__."""
    self.args, self.settings = args, settings


def engine_of(tmp_path, monkeypatch, **fields):
    monkeypatch.setattr(vllm.VLLMEngine, "__init__", recorded)
    monkeypatch.setattr(vllm, "check_generation_kwargs", lambda given: None)
    monkeypatch.setattr(vllm_server.VLLMServer, "__init__", recorded)
    args = RLOOConfig(str(tmp_path), use_cpu=True, **fields)
    name = engine_name(args.rollout_engine, args.use_vllm, args.vllm_mode)
    settings = EngineSettings.from_config(
        args, make_model(), make_tokenizer(), TrainingEngine(ACCELERATOR)
    )
    return make_engine(find_engine(name), settings)


def test_transformers_is_the_default(tmp_path, monkeypatch):
    assert isinstance(engine_of(tmp_path, monkeypatch), HFEngine)


def test_settings_of_the_engine_in_process(tmp_path, monkeypatch):
    monkeypatch.setattr(RLOOConfig, "world_size", 2)
    engine = engine_of(
        tmp_path, monkeypatch, use_vllm=True, vllm_enable_sleep_mode=True,
        vllm_tensor_parallel_size=2, vllm_max_model_length=64, vllm_gpu_memory_utilization=0.5,
        vllm_model_impl="transformers", vllm_structured_outputs_regex="w1+",
        vllm_engine_kwargs={"max_num_seqs": 3}, seed=7, bf16=True, num_generations=4,
        per_device_train_batch_size=6, gradient_accumulation_steps=2, per_device_eval_batch_size=4,
    )  # fmt: skip
    settings = engine.settings
    assert settings.pop("tokenizer").eos_token == "<eos>"
    assert settings == {
        "dtype": torch.bfloat16, "sleeps": True, "tensor_parallel_size": 2,
        "max_model_length": 64, "gpu_memory_utilization": 0.5, "model_impl": "transformers",
        "regex": "w1+", "seed": 7, "adapter": None, "processor": None,
        "engine_kwargs": {"max_num_seqs": 3},
        "max_num_seqs": 24,  # of two processes that share an engine
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "sequences"),
    [
        ({}, 8),
        ({"steps_per_generation": 4}, 32),
        ({"per_device_eval_batch_size": 40}, 40),
        ({"per_device_train_batch_size": 4000}, 1024),  # vLLM's own default on a large GPU
    ],
)
def test_the_engine_samples_a_process_completions_together(
    fields, sequences, tmp_path, monkeypatch
):
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, **fields}
    engine = engine_of(tmp_path, monkeypatch, use_vllm=True, **sizes)
    assert engine.settings["max_num_seqs"] == sequences


def test_a_share_of_the_gpu_that_was_given_is_told_from_the_default(tmp_path, monkeypatch):
    common = {"use_vllm": True, "vllm_enable_sleep_mode": True}
    left_out = engine_of(tmp_path, monkeypatch, **common)
    given = engine_of(tmp_path, monkeypatch, vllm_gpu_memory_utilization=0.3, **common)
    assert left_out.settings["gpu_memory_utilization"] is None  # the room's to decide
    assert given.settings["gpu_memory_utilization"] == 0.3


def test_a_share_that_was_left_out_stays_so_in_a_copy_of_the_configuration(tmp_path):
    args = RLOOConfig(str(tmp_path), use_cpu=True)
    assert args.vllm_gpu_memory_utilization == 0.3  # TRL's
    for copied in (replace(args, seed=1), RLOOConfig(**args.to_dict())):
        assert given_share(copied.vllm_gpu_memory_utilization) is None
    assert json.loads(args.to_json_string())["vllm_gpu_memory_utilization"] == 0.3


# What an engine can make use of


def needed(model, **own) -> int | None:
    known = {"max_model_length": 100, "max_num_seqs": 16, **own}
    settings = EngineSettings(model, None, torch.bfloat16, in_process=InProcessSettings(**known))
    return needed_bytes(settings)


def test_an_engine_needs_weights_and_a_cache_for_all_its_sequences():
    model = make_model()
    config = model.config
    weights = 2 * sum(p.numel() for p in model.parameters())
    head = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * 2
    assert needed(model) == weights + 1600 * per_token + WORKSPACE
    of_two = needed(model, tensor_parallel_size=2)
    assert of_two == weights // 2 + 1600 * per_token // 2 + WORKSPACE
    assert needed(model, engine_kwargs={"max_num_seqs": 32}) == weights + 3200 * per_token + (
        WORKSPACE
    )


@pytest.mark.parametrize(
    "own", [{"max_model_length": None}, {"engine_kwargs": {"max_model_len": -1}}]
)
def test_what_cannot_be_known_is_not_guessed(own):
    assert needed(make_model(), **own) is None


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({}, "http://0.0.0.0:8000"),
        ({"vllm_server_host": "gpu7", "vllm_server_port": 81}, "http://gpu7:81"),
        ({"vllm_server_host": "::1"}, "http://[::1]:8000"),
        ({"vllm_server_base_url": "https://x/v", "vllm_server_port": 81}, "https://x/v"),
    ],
)
def test_settings_of_the_server(fields, url, tmp_path, monkeypatch):
    engine = engine_of(
        tmp_path, monkeypatch, use_vllm=True, vllm_mode="server", vllm_server_timeout=9.0,
        vllm_weight_transfer="http", **fields,
    )  # fmt: skip
    assert engine.args == (url,)
    assert engine.settings["timeout_s"] == 9.0
    assert engine.settings["weight_transfer"] == "http"
    assert engine.settings["device"] == torch.device("cpu")
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
        vllm_package.import_vllm()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.32.0rc1", LLM=None))
    platforms = SimpleNamespace(current_platform=None)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    assert vllm_package.import_vllm().__version__ == "0.32.0rc1"


def test_a_missing_vllm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r'pip install "rloo-fast\[vllm\]"'):
        vllm_package.import_vllm()
