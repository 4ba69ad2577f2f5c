"""Weights streamed from sharded models: those of the whole one, in little memory, on every rank."""

from __future__ import annotations

import importlib.util
import json
import os

import pytest

from tests.support.launch import run_worker_processes

MIB = 2**20
with_deepspeed = importlib.util.find_spec("deepspeed") or os.environ.get("CI")
SHARDED = ("fsdp2", "zero3") if with_deepspeed else ("fsdp2",)
KINDS = {"full": False, "LoRA": True}
MODELS = {"qwen2-tied": "float32", "gpt_neox": "float32", "llama": "bfloat16"}


def cases() -> dict[str, tuple]:
    """(look, engine, model, dtype, with LoRA); the looks are in stream_worker."""
    found = []
    for engine in SHARDED:
        for kind in KINDS:
            found += [("weights", engine, *model, kind) for model in MODELS.items()]
            found += [("memory", engine, "big", dtype, kind) for dtype in ("float32", "bfloat16")]
        found += [("step", engine, "llama", "bfloat16", "full")]
        found += [("parts", engine, "llama", "float32", "LoRA")]
        found += [("failure", engine, "llama", "float32", "LoRA")]
    found += [("weights", "hsdp", "llama", "float32", "LoRA")]
    found += [("weights", "fsdp2", "mixtral", "float32", "full")]  # its checkpoints are cut finer
    found += [("rounded", "fsdp2", "llama", "float32", "full")]
    found += [("memory", "plain", "big", "bfloat16", "LoRA")]
    return {" ".join(case): case for case in found}


def named(look: str) -> list[str]:
    return [name for name, case in cases().items() if case[0] == look]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """{case: [what each of two gloo processes saw]}, all in one launch."""
    looks = {"weights": "look_at_weights", "memory": "look_at_memory"}
    looks |= {"rounded": "look_at_rounded", "parts": "look_at_parts"}
    looks |= {"step": "look_after_step", "failure": "look_after_failure"}
    asked = {
        name: {"look": looks[look], "engine": e, "model": m, "dtype": dtype, "lora": KINDS[kind]}
        for name, (look, e, m, dtype, kind) in cases().items()
    }
    out = tmp_path_factory.mktemp("streams") / "facts.json"
    done = run_worker_processes("stream_worker", str(out), json.dumps(asked))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", named("weights") + named("parts") + named("rounded"))
def test_a_sharded_model_is_sent_like_the_whole_one(name, facts):
    for rank in facts[name]:
        assert rank == {"differing": [], "cut otherwise": False, "gathered afterwards": False}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", named("step"))
def test_after_a_step_the_new_weights_are_sent(name, facts):
    for rank in facts[name]:
        assert rank["changed"] > 10
        assert rank["differing"] == []
        assert rank["kept whole"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", named("failure"))
def test_an_engine_that_fails_in_a_load_leaves_the_model_sharded_and_trainable(name, facts):
    for rank in facts[name]:
        assert "told to fail" in rank["failed"]
        assert not rank["gathered afterwards"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", named("memory"))
def test_a_stream_takes_at_most_two_buckets_and_never_the_whole_model(name, facts):
    for rank in facts[name]:
        sizes = {key: f"{rank[key] / MIB:.2f} MiB" for key in ("peak", "bucket", "model")}
        print(f"{name}: {sizes}")
        assert rank["peak"] <= 2 * rank["bucket"] < rank["model"]
        assert rank["kept"] == 0
        assert rank["differing"] == []
