"""The rollout and sync benchmarks: their gates, what they count, and what they do without vLLM."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json

import pytest
import torch

from benchmarks.common import harness, memory
from benchmarks.common import models as step_models
from benchmarks.rollout import providers as rollout_providers
from benchmarks.rollout import run as rollout
from benchmarks.rollout.providers import SHAPES
from benchmarks.sync import run as sync
from rloo_fast.rollout import HFEngine
from rloo_fast.rollout.engine import EngineState
from rloo_fast.weight_sync.buckets import weight_buckets
from tests.benchmarks.test_loss import DESIGN_KEYS
from tests.support.tiny import require_vllm

SHORT = SHAPES["short"]
TINY = ["--model", "tiny", "--shape", "short", "--no-memory"]
ARGUMENTS = argparse.Namespace(bucket_mib=[1, 16], runs=2)


def run(folder, *arguments):
    """(exit status, rows by provider) of `benchmarks.rollout` on a tiny model."""
    path = folder / "rollout.json"
    status = rollout.main([*TINY, *arguments, "--json", str(path)])
    _, rows = harness.read_json(path)
    return status, {row.provider: row for row in rows}


@pytest.fixture
def no_vllm(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a)
    )


# The rollout command


def test_engines_pass_the_gate_and_have_figures(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    status, rows = run(tmp_path, "--engines", "hf,hf-plain,trl-hf", "--runs", "2")
    assert status == 0
    assert list(rows) == ["hf", "hf-plain", "trl-hf"]
    p, rows_, new = SHORT.prompt, SHORT.num_rows, SHORT.limit
    # the last token of a prompt is run with a row's own, the last one of a completion never
    shared = SHORT.num_prompts * (p - 1) + rows_ * new
    for name, tokens in (("hf", shared), ("hf-plain", rows_ * (p + new - 1))):
        assert rows[name].note.startswith(f"{tokens} tokens in "), name
        assert rows[name].error_vs_reference <= 1e-5
        assert f"trl-hf / {name} " in rows[name].note
    assert f"{rows_ * (p + new - 1)} tokens in {new} forwards" in rows["trl-hf"].note
    for row in rows.values():
        assert list(dataclasses.asdict(row))[: len(DESIGN_KEYS)] == DESIGN_KEYS
        assert row.runs == 2
        assert row.seconds_median > 0
        assert row.tokens == rows_ * new
        assert f"{torch.get_num_threads()} thread" in row.note


@pytest.mark.usefixtures("no_vllm")
def test_vllm_missing_is_a_reason_and_no_failure(tmp_path):
    status, rows = run(tmp_path, "--engines", "vllm,hf,vllm-n", "--runs", "1")
    assert status == 0
    assert rows["vllm"].skipped == rows["vllm-n"].skipped == "vllm is not installed"
    assert rows["hf"].seconds_median > 0


def plant(monkeypatch, change):
    """Every HFEngine samples with `change`d settings."""
    right = HFEngine._generate

    def wrong(self, prompt_ids, sampling, seeds, on_finished):
        return right(self, prompt_ids, change(sampling), seeds, on_finished)

    monkeypatch.setattr(HFEngine, "_generate", wrong)


def test_another_temperature_fails_the_command_and_has_no_figures(monkeypatch, tmp_path):
    plant(monkeypatch, lambda sampling: dataclasses.replace(sampling, temperature=0.9))
    status, rows = run(tmp_path, "--engines", "hf")
    assert status == 1
    assert str(rows["hf"].skipped).startswith("wrong: log-probs off by ")
    assert rows["hf"].seconds_median is rows["hf"].error_vs_reference is None


def test_completions_that_stop_early_are_no_equal_work(monkeypatch, tmp_path):
    plant(monkeypatch, lambda sampling: dataclasses.replace(sampling, max_new_tokens=5))
    status, rows = run(tmp_path, "--engines", "hf")
    assert status == 1
    assert rows["hf"].skipped == "wrong: 8 completions of [5] tokens, not 8 of 8"


def test_an_engine_with_other_threads_than_were_asked_for_is_refused(monkeypatch, tmp_path):
    before = torch.get_num_threads()
    plant(monkeypatch, lambda sampling: torch.set_num_threads(1) or sampling)
    try:
        status, rows = run(tmp_path, "--engines", "hf", "--threads", "2")
    finally:
        torch.set_num_threads(before)
    assert status == 1
    assert rows["hf"].skipped == "wrong: ran with 1 threads, not 2"


def test_an_engine_that_raises_fails_alone(monkeypatch, tmp_path):
    def raising(engines):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(rollout_providers.MAKERS, "hf-plain", raising)
    status, rows = run(tmp_path, "--engines", "hf-plain,hf", "--runs", "1")
    assert status == 1
    assert rows["hf-plain"].skipped == "failed: RuntimeError: out of memory"
    assert rows["hf"].seconds_median > 0


@pytest.mark.parametrize(
    ("main", "arguments", "sentence"),
    [
        (rollout.main, ["--engines", "hf,magic"], "got magic"),
        (rollout.main, ["--runs", "0"], "must be >= 1; got 0"),
        (sync.main, ["--policies", "full,magic"], "got magic"),
        (sync.main, ["--bucket-mib", "0,1"], "must be >= 1"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(main, arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert sentence in capsys.readouterr().err


def test_ratios_are_of_medians_and_of_the_same_round():
    rows = {name: harness.Row("rollout", name, "", "cpu", "float32") for name in ("trl-hf", "hf")}
    rollout.add_ratios(rows, {"trl-hf": [4.0, 6.0, 30.0], "hf": [4.0, 2.0, 3.0]})
    assert rows["hf"].note == "trl-hf / hf 2.00 by medians, 3.00 by rounds (1.00 .. 10.00 over 3)"
    assert rows["trl-hf"].note is None


def test_memory_is_that_of_one_rollout_and_its_settings_travel_as_json(monkeypatch, tmp_path):
    args = rollout.parse_arguments([*TINY, "--engines", "hf"])
    settings = rollout.make_settings(args, tmp_path)
    step_models.save_model("tiny", settings.model_folder)

    def here(target, arguments):
        assert target == "benchmarks.rollout.providers:memory_step"
        return memory.measure(rollout_providers.memory_step(**json.loads(json.dumps(arguments))))

    monkeypatch.setattr(memory, "cpu_peak_extra_mib", here)
    rows = {"hf": harness.Row("rollout", "hf", "", "cpu", "float32")}
    rollout.measure_memory(settings, rows)
    assert rows["hf"].peak_extra_mem_mib >= 0


# With vLLM


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_passes_the_gate_and_runs_each_prompt_once_in_every_call(tmp_path):
    require_vllm()
    path = tmp_path / "rollout.json"
    arguments = ["--model", "pythia-14m", "--shape", "tldr", "--num-generations", "2"]
    arguments += ["--prompts", "1", "--runs", "1", "--no-memory", "--engines", "vllm,vllm-n"]
    assert rollout.main([*arguments, "--json", str(path)]) == 0
    _, (ours, theirs, start) = harness.read_json(path)
    # three blocks of 128 tokens are shared by the two rows; nothing is left from the call before
    tokens = 400 + (400 - 3 * 128) + 2 * 52
    for row in (ours, theirs):
        assert f"{tokens} tokens in " in row.note, row
        assert row.tokens == 2 * 53
    assert ours.error_vs_reference <= 1e-5
    assert (start.benchmark, start.provider, start.tokens) == ("start", "vllm", None)
    assert start.seconds_median > 0


@pytest.fixture(scope="module")
def served():
    """(policy, engine that is ready with its weights)."""
    require_vllm()
    policy = sync.make_policy("pythia-14m", "full")
    engine = rollout_providers.start_vllm(policy, sync.SHAPE)
    yield policy, engine
    engine.close()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("policy", sync.POLICIES)
def test_every_way_to_sync_passes_the_gate_and_has_figures(policy, served):
    model, engine = served
    trained = model if policy == "full" else sync.make_policy("pythia-14m", policy)
    rows = {row.provider: row for row in sync.run_policy(engine, trained, policy, ARGUMENTS)}
    assert list(rows) == ["ours 1 MiB", "ours 16 MiB", "unchecked", "each", "reload", "copy"]
    for row in rows.values():
        assert row.skipped is None, row
        assert row.seconds_median > 0
        assert row.note.endswith(" s/GiB")
    size = sum(tensor.nbytes for _, tensor in model.named_parameters()) / 2**30
    assert rows["copy"].shape == f"{policy} {size:.3f} GiB"
    assert engine.state is EngineState.READY


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("left_out", ["layers.3.mlp.dense_4h_to_h.weight", "final_layer_norm.bias"])
def test_a_sync_that_leaves_a_parameter_out_fails_the_gate(left_out, served):
    policy, engine = served

    def all_but_one():
        everything = [named for bucket in weight_buckets(policy, 2**20) for named in bucket]
        kept = [named for named in everything if not named[0].endswith(left_out)]
        assert len(kept) == len(everything) - 1
        return [kept]

    def unchecked():
        (weights,) = all_but_one()
        with torch.no_grad():
            engine.llm.apply_model(lambda model: model.load_weights(weights))
        engine.llm.reset_prefix_cache()

    syncs = {
        "unchecked": unchecked,
        "ours": lambda: engine.load_weights(0, all_but_one()),
        "right": lambda: engine.load_weights(0, weight_buckets(policy, 2**20)),
    }
    rows = {name: harness.Row("sync", name, "", "cpu", "float32") for name in syncs}
    assert list(sync.gate(engine, policy, syncs, rows)) == ["right"]
    assert str(rows["unchecked"].skipped).startswith("wrong: log-probs off by ")
    assert "did not cover these weights" in str(rows["ours"].skipped)


@pytest.mark.usefixtures("no_vllm")
def test_a_sync_without_vllm_is_skipped_with_the_reason(tmp_path):
    assert sync.main(["--model", "tiny", "--json", str(tmp_path / "sync.json")]) == 0
    _, (row,) = harness.read_json(tmp_path / "sync.json")
    assert row.skipped == "vllm is not installed"
