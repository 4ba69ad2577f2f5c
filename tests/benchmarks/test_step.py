"""The step benchmark: its gate, its turns, its counts of tokens, its factors and its FLOPs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import harness, memory
from benchmarks.common import models as step_models
from benchmarks.common.models import SHAPES
from benchmarks.step import profile as step_profile
from benchmarks.step import providers as step_providers
from benchmarks.step import run as step
from benchmarks.step.providers import LADDER, Settings, Steps, Watch
from rloo_fast import RLOOTrainer
from rloo_fast.step.update import Updater
from tests.benchmarks.test_loss import DESIGN_KEYS

SHORT = SHAPES["short"]
TINY = ["--model", "tiny", "--shape", "short", "--no-memory", "--whole-step-runs", "0"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The command run end to end on a tiny model: (exit status, rows by (benchmark, provider),
    stdout)."""
    path = tmp_path_factory.mktemp("step") / "step.json"
    arguments = [*TINY, "--split", "--runs", "2", "--whole-step-runs", "1", "--profile"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = step.main([*arguments, "--json", str(path)])
    _, rows = harness.read_json(path)
    assert list(dataclasses.asdict(rows[0]))[: len(DESIGN_KEYS)] == DESIGN_KEYS
    return status, {(row.benchmark, row.provider): row for row in rows}, out.getvalue()


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    step_models.save_model("tiny", folder / "model")
    return Settings(
        model_folder=str(folder / "model"),
        output_folder=str(folder / "out"),
        shape_name="short",
        num_generations=SHORT.num_generations,
        num_prompts=SHORT.num_prompts,
        device="cpu",
        dtype="float32",
        rows_per_micro_batch=SHORT.num_rows,
        beta=0.05,
        gradient_checkpointing=False,
    )


# The command


def test_the_whole_ladder_passes_the_gate_and_has_figures(written):
    status, rows, _ = written
    updates = {provider: row for (benchmark, provider), row in rows.items() if benchmark[0] == "u"}
    assert status == 0
    assert list(updates) == list(LADDER)
    for row in updates.values():
        assert row.skipped is None, row
        assert row.runs == 2
        assert row.seconds_median > 0
        assert row.error_vs_reference <= 1e-5
        assert row.tokens == sum(SHORT.lengths())


def test_the_whole_step_is_measured_for_both_trainers(written):
    _, rows, _ = written
    for provider in ("trl", "ours"):
        whole, update = rows["step", provider], rows["update", provider]
        assert whole.runs == 1
        assert whole.tokens == SHORT.num_rows * SHORT.limit
        assert whole.seconds_median > update.seconds_min
    assert "trl / ours" in rows["step", "ours"].note


def test_tokens_run_are_what_each_layout_predicts(written):
    _, rows, _ = written
    lengths, p = SHORT.lengths(), SHORT.prompt
    trl = SHORT.num_rows * (p + max(lengths))
    # ours leaves out the last token of a completion: nothing is predicted from it
    padded = SHORT.num_rows * (p + max(lengths) - 1)
    packed = sum(p + n - 1 for n in lengths)
    shared = SHORT.num_prompts * p + sum(n - 1 for n in lengths)
    expected = {
        "trl": (2, trl), "trl_gpu_head": (2, trl), "ours_padded_two_passes": (2, padded),
        "ours_padded": (1, padded), "ours_packed": (1, packed), "ours": (1, shared),
    }  # fmt: skip
    for provider, (forwards, tokens) in expected.items():
        policy = f"policy {forwards * tokens} tokens in {forwards} forward{'s'[: forwards > 1]},"
        reference = f"reference {tokens} tokens in 1 forward"
        assert rows["update", provider].note.startswith(f"{policy} {reference}"), provider


def test_the_output_names_threads_factors_and_profile(written):
    _, _, out = written
    threads = dict.fromkeys(LADDER, torch.get_num_threads())
    assert f"threads in a step: {threads}" in out
    assert out.count("profile of one update of ours") == 1
    product, total = out.split("  product ")[1].split("\n")[0].split("; trl / ours by medians ")
    assert product == total


def test_trl_missing_is_a_reason_and_no_failure(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "trl" else find(name, *a)
    )
    assert step.main([*TINY, "--runs", "1"]) == 0
    out = capsys.readouterr().out
    assert "skipped: trl is not installed" in out
    assert "gate passed by ours\n" in out


def test_a_refused_config_is_a_reason_and_no_failure(monkeypatch, settings):
    from rloo_fast.config import ranges

    planted = {**ranges.RANGES, "layout": (lambda name: name == "auto", "'auto'")}
    monkeypatch.setattr(ranges, "RANGES", planted)
    rows = make_rows("ours_packed", "ours")
    assert list(step.make_steps(list(rows), settings, rows)) == ["ours"]
    assert str(rows["ours_packed"].skipped).startswith("its config is refused: layout must be")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--providers", "ours,magic"], "got magic"),
        (["--profile", "magic"], "got magic"),
        (["--shape", "short", "--rows-per-micro-batch", "3"], "must divide the step's 8 rows"),
        (["--num-generations", "1"], "--num-generations must be >= 2"),
        (["--runs", "0"], "--runs must be >= 1"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        step.main(arguments)
    assert sentence in capsys.readouterr().err


# The gate


def make_rows(*names):
    return {name: harness.Row("update", name, "", "cpu", "float32") for name in names}


def plant(monkeypatch, factor):
    right = RLOOTrainer.compute_loss
    monkeypatch.setattr(RLOOTrainer, "compute_loss", lambda *a, **k: factor * right(*a, **k))


def test_a_wrong_loss_fails_the_command_and_has_no_figures(monkeypatch, tmp_path):
    plant(monkeypatch, 1.01)
    assert step.main([*TINY, "--runs", "1", "--json", str(tmp_path / "wrong.json")]) == 1
    rows = {row.provider: row for row in harness.read_json(tmp_path / "wrong.json")[1]}
    assert str(rows["ours"].skipped).startswith("wrong: relative differences above 0.001: loss ")
    assert rows["ours"].seconds_median is rows["ours"].error_vs_reference is None
    assert rows["trl"].seconds_median > 0


@pytest.mark.parametrize("factor", [-1.0, float("nan")])
def test_a_gradient_of_the_right_length_or_of_none_fails_the_gate(factor, monkeypatch, settings):
    plant(monkeypatch, factor)
    rows = make_rows("trl", "ours")
    steps = step.make_steps(list(rows), settings, rows)
    assert list(step.gate(steps, rows, 1e-3)) == ["trl"]


def test_a_loss_without_its_kl_fails_the_gate(settings):
    rows = make_rows("trl", "ours")
    forgotten = dataclasses.replace(settings, beta=1e-12)
    steps = {"trl": Steps("trl", settings), "ours": Steps("ours", forgotten)}
    assert list(step.gate(steps, rows, 1e-3)) == ["trl"]
    assert str(rows["ours"].skipped).startswith("wrong: ")


def test_a_provider_that_raises_fails_alone(monkeypatch, settings):
    def raising(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Updater, "attempt", raising)
    rows = make_rows("ours", "trl")
    steps = step.make_steps(list(rows), settings, rows)
    assert list(step.gate(steps, rows, 1e-3)) == ["trl"]
    assert rows["ours"].skipped == "failed: RuntimeError: out of memory"


# Turns and factors


def test_trainers_take_turns_and_pairs_stay_together():
    calls = []

    def called(name):
        calls.append(name)
        return float(len(calls))

    steps = {name: (lambda name=name: called(name)) for name in "abc"}
    seconds = step.take_turns(steps, 3, "update")
    assert "".join(calls) == "abc" + "cba" + "abc"
    assert seconds == {"a": [1.0, 6.0, 7.0], "b": [2.0, 5.0, 8.0], "c": [3.0, 4.0, 9.0]}


def test_the_factors_multiply_to_the_total():
    generator = torch.Generator().manual_seed(0)
    seconds = {name: torch.rand(5, generator=generator).add(0.5).tolist() for name in LADDER}
    del seconds["ours_packed"]  # as if it was skipped
    factors = step.split(dict(reversed(seconds.items())))
    total = statistics.median(seconds["trl"]) / statistics.median(seconds["ours"])
    assert math.prod(f.factor for f in factors) == pytest.approx(total)
    assert [f.rung for f in factors] == list(seconds)[1:]
    assert factors[-1].saves == "every shared token once"
    assert factors[0].lowest == min(
        a / b for a, b in zip(seconds["trl"], seconds["trl_gpu_head"], strict=True)
    )


# The trainers


def test_the_clock_covers_the_step_and_nothing_around_it(settings, monkeypatch):
    steps, now = Steps("ours", settings), [0.0]
    monkeypatch.setattr(Watch, "now", lambda self: now[0])
    loader, loss = steps.trainer.get_train_dataloader, steps.trainer.compute_loss

    def slow(function):
        return lambda *args, **kwargs: (now.append(now.pop() + 0.5), function(*args, **kwargs))[1]

    steps.trainer.get_train_dataloader = slow(loader)
    assert steps.update() == 0
    steps.trainer.compute_loss = slow(loss)
    assert steps.update() == 0.5


@pytest.mark.parametrize("provider", ["trl", "ours"])
def test_generation_is_injected_in_updates_and_real_in_whole_steps(provider, settings, monkeypatch):
    seen = []

    def recording(completion_ids, **kwargs):
        seen.append([list(ids) for ids in completion_ids])
        return [float(sum(ids)) for ids in completion_ids]

    monkeypatch.setattr(step_models, "fixed_reward", recording)
    steps = Steps(provider, settings)
    for _ in range(2):
        steps.update()
        steps.whole()
    planned = step_models.completions(SHORT, 512)
    assert seen[0] == seen[2] == planned
    for sampled in (seen[1], seen[3]):
        assert [len(ids) for ids in sampled] == [SHORT.limit] * SHORT.num_rows
        assert sampled != planned


def test_trl_gpu_head_scores_completion_tokens_alone(settings, monkeypatch):
    from trl.trainer import utils

    rows, real = [], utils._ChunkedLogProbFunction

    def apply(hidden, *args):
        rows.append(len(hidden))
        return real.apply(hidden, *args)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=apply))
    for provider in ("trl_gpu_head", "trl"):  # and the patch is undone after it
        Steps(provider, settings).update()
    all_positions = SHORT.num_rows * (SHORT.prompt + max(SHORT.lengths()) - 1)
    assert rows == 3 * [sum(SHORT.lengths())] + 3 * [all_positions]


def test_all_trainers_start_from_the_same_weights_which_are_not_the_references(settings):
    trl = Steps("trl", settings)
    ours = Steps("ours", settings, trl.reference)
    theirs = dict(trl.trainer.model.named_parameters())
    references = dict(ours.reference.named_parameters())
    for name, weight in ours.trainer.model.named_parameters():
        assert torch.equal(weight, theirs[name])
        if weight.std() > 0:
            change = (weight.detach() - references[name]).std() / references[name].std()
            assert float(change) == pytest.approx(0.1, rel=0.1), name


def test_memory_is_that_of_one_update_and_its_settings_travel_as_json(settings, monkeypatch):
    asked = []

    def here(target, arguments):
        module, function = target.split(":")
        assert module == step_providers.__name__
        update = getattr(step_providers, function)(**json.loads(json.dumps(arguments)))
        asked.append((update.__self__.name, update.__self__.settings))
        return memory.measure(update)

    monkeypatch.setattr(memory, "cpu_peak_extra_mib", here)
    rows = make_rows("trl", "ours")
    step.measure_memory(settings, dict.fromkeys(rows), rows)
    assert asked == [("trl", settings), ("ours", settings)]
    assert rows["trl"].peak_extra_mem_mib > 0


# What is computed


@pytest.mark.parametrize(("shape", "mean"), [("tldr", 41.5), ("math", 197), ("code", 350)])
def test_completion_lengths_follow_the_stated_distribution(shape, mean):
    many = SHAPES[shape].with_sizes(None, 500)
    lengths = many.lengths()
    assert statistics.mean(lengths) == pytest.approx(mean, rel=0.03)
    assert max(lengths) == many.limit
    ends = [ids[-1] == step_models.EOS for ids in step_models.completions(many, 512)]
    assert ends == [length < many.limit for length in lengths]


@pytest.mark.parametrize("name", ["tiny", "qwen2.5-0.5b"])
def test_flops_of_a_forward_equal_those_counted(name):
    from torch.utils.flop_counter import FlopCounterMode

    config, rows, width = step_models.model_config(name), 3, 16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        ids = torch.zeros(rows, width, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids) if name != "tiny" else model.gpt_neox(input_ids=ids)
    predicted = 7
    head = 2 * predicted * config.hidden_size * config.vocab_size
    formula = step_models.forward_flops(config, rows * width, rows * width * width, predicted)
    rotary = 2 * width * config.hidden_size  # frequencies, a product of positions: not counted
    assert formula - head == pytest.approx(counter.get_total_flops(), abs=rows * rotary)


def test_attended_pairs_are_those_of_the_mask():
    prompt, lengths, k = 5, [1, 4, 2, 3], 2
    pairs = 0
    for group in (lengths[:k], lengths[k:]):
        spans = [range(prompt)]
        for length in group:
            end = spans[-1].stop
            spans.append(range(end, end + length - 1))
        for span in spans:
            pairs += sum(key in span or key in spans[0] for q in span for key in range(q + 1))
    assert step_models.attended_pairs(prompt, 2, lengths) == pairs


def event(name, seconds, parent=None):
    return SimpleNamespace(name=name, cpu_parent=parent, self_cpu_time_total=1e6 * seconds)


def test_profiled_time_is_grouped_by_what_encloses_it():
    backward = event("autograd::engine::evaluate_function: AddmmBackward0", 0.5)
    head = event("rloo_kernels::linear_logprob", 1.0)
    optimizer = event("Optimizer.step#AdamW.step", 2.0)
    events = [
        backward, head, optimizer, event("aten::mm", 4.0, backward), event("aten::mm", 8.0, head),
        event("aten::addmm", 16.0), event("aten::mul", 32.0, optimizer), event("aten::mul", 64.0),
        event("aten::_scaled_dot_product_flash_attention_for_cpu", 128.0),
    ]  # fmt: skip
    assert step_profile.group_events(events, "cpu") == {
        ("other", "backward"): 0.5, ("head + loss", "forward"): 9.0,
        ("optimizer", "forward"): 34.0, ("other products", "backward"): 4.0,
        ("other products", "forward"): 16.0, ("other", "forward"): 64.0,
        ("attention", "forward"): 128.0,
    }  # fmt: skip


def test_a_profile_counts_all_of_the_update(settings):
    steps = Steps("ours", settings)
    steps.update()
    shares = step_profile.profile_update(steps.update, "cpu")
    assert sum(shares.values()) > 0
    for phase in ("forward", "backward"):
        for group in ("head + loss", "attention", "other products"):
            assert shares[group, phase] > 0, (group, phase)
    assert shares["optimizer", "forward"] > 0
