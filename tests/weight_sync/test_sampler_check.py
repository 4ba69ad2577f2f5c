"""Sampler against trainer: what is counted as a difference, and what stops a run."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from rloo_fast import RLOOConfig
from rloo_fast.records import PreparedBatch, Sampling
from rloo_fast.reports.metrics import sampling_metrics
from rloo_fast.rollout import HFEngine
from rloo_fast.weight_sync.sampler_check import SamplerCheck, SamplerMismatch, computes_exactly
from tests.step.test_update import constant_for_first_prompt, train
from tests.support.batches import prepared_batch
from tests.support.tiny import make_model

NAN = math.nan


def make_check(
    tmp_path, dtype=torch.float32, mixed_precision="no", has_dropout=False, extra=None, **fields
) -> SamplerCheck:
    args = RLOOConfig(str(tmp_path), use_cpu=True, report_to="none", **fields)
    sampling = Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        max_new_tokens=8,
        stop_token_ids=(1,),
        extra=extra or {},
    )
    return SamplerCheck(
        sampling,
        is_exact=computes_exactly(dtype, mixed_precision),
        warn=args.logp_diff_warn,
        stop=args.logp_diff_stop,
        level=args.truncated_importance_sampling,
        cap=args.importance_sampling_cap,
        structured_outputs=args.vllm_structured_outputs_regex,
        has_dropout=has_dropout,
    )


def make_batch(diff: list[list[float]], trainer: list[list[float]] | None = None) -> PreparedBatch:
    """Rows whose sampler log-probs are the trainer's plus `diff`."""
    diffs = torch.tensor([d for row in diff for d in row])
    old = torch.full_like(diffs, -2.0)
    if trainer is not None:
        old = torch.tensor([t for row in trainer for t in row])
    return prepared_batch(
        prompt_ids=[[5]] * len(diff),
        completion_ids=[[7] * len(row) for row in diff],
        sampler_logps=torch.where(old.isnan(), -2.0, old) + diffs,
        prepared={"old_logps": old},
    )


def judge(check: SamplerCheck, diff: list[list[float]], **kwargs) -> None:
    check.judge(check.columns(make_batch(diff, **kwargs)), "train, after step 3")


def test_differences_are_those_of_the_tokens_that_both_know(tmp_path):
    """A masked row has no tokens; one that was not run, no log-probs of the trainer."""
    batch = make_batch([[0.1, -0.3], [], [9.0, 9.0], [0.2]], [[-1.0, -2.0], [], [NAN, NAN], [-3.0]])
    found = sampling_metrics(make_check(tmp_path).columns(batch))
    assert found == {
        "sampling/logp_diff_mean": pytest.approx(0.2),
        "sampling/logp_diff_judged": pytest.approx(0.2),
        "sampling/logp_diff_max": pytest.approx(0.3),
    }


def test_nothing_is_said_of_samples_that_were_not_run(tmp_path):
    check = make_check(tmp_path)
    rows = check.columns(dataclasses.replace(make_batch([[9.0], [9.0]]), old_logps=None))
    check.judge(rows, "here")
    assert all(math.isnan(value) for value in sampling_metrics(rows).values())


def test_rows_of_older_weights_are_logged_apart_and_not_judged(tmp_path):
    """A completion that new weights went on with may rest on what the old ones computed."""
    batch = make_batch([[0.1, -0.3], [2.0, -1.0], [-3.0], [], [0.2]])
    versions = torch.tensor([7, 7, 6, 7, 5, 7], dtype=torch.int32)
    stale = dataclasses.replace(batch.generation, token_versions=versions, weights_version=7)
    check = make_check(tmp_path, logp_diff_stop=0.25)
    rows = check.columns(dataclasses.replace(batch, generation=stale))
    assert sampling_metrics(rows) == {
        "sampling/logp_diff_mean": pytest.approx(0.2),
        "sampling/logp_diff_judged": pytest.approx(0.2),
        "sampling/logp_diff_max": pytest.approx(0.3),
        "staleness/logp_diff_mean": pytest.approx(2.0),
        "sampling/importance_raw_mean": pytest.approx((math.exp(-1) + math.exp(3)) / 2),
        "sampling/importance_raw_max": pytest.approx(math.exp(3)),
        "sampling/importance_clipped_mean": pytest.approx((math.exp(-1) + math.exp(3)) / 2),
        "sampling/frac_clipped": 0,
        "sampling/ess": pytest.approx(
            (math.exp(-1) + math.exp(3)) ** 2 / (2 * (math.exp(-2) + math.exp(6)))
        ),
    }
    check.judge(rows, "train, after step 3", trains=True)
    with pytest.raises(SamplerMismatch):  # the same, had the policy's own weights sampled
        check.judge(check.columns(batch), "train, after step 3")


def test_ratios_beyond_all_numbers_leave_one_completion_of_effect(tmp_path):
    batch = make_batch([[0.0], [-900.0], [0.0], [0.0]])
    versions = torch.full((4,), 6, dtype=torch.int32)
    stale = dataclasses.replace(batch.generation, token_versions=versions, weights_version=7)
    rows = make_check(tmp_path).columns(dataclasses.replace(batch, generation=stale))
    found = sampling_metrics(rows)
    assert found["sampling/importance_raw_max"] == math.inf
    assert found["sampling/ess"] == pytest.approx(1 / 4)


def test_a_log_prob_that_is_none_stops_the_run_whoever_sampled(tmp_path):
    batch = make_batch([[0.1], [math.inf]])
    versions = torch.tensor([7, 6], dtype=torch.int32)
    stale = dataclasses.replace(batch.generation, token_versions=versions, weights_version=7)
    check = make_check(tmp_path)
    with pytest.raises(SamplerMismatch, match="1 sampled tokens a log-prob that is NaN"):
        check.judge(check.columns(dataclasses.replace(batch, generation=stale)), "here")


def test_a_large_difference_stops_the_run_and_says_what_to_look_at(tmp_path):
    check = make_check(tmp_path)
    judge(check, [[0.009], [-0.009]])
    with pytest.raises(SamplerMismatch) as raised:
        judge(check, [[0.01, 0.01], [-0.05]])
    for part in (
        "train, after step 3: the log-probs of 3 sampled tokens", "by 0.0233 on average, 0.05 at",
        "older weights", "one parameter did not reach it", "temperature", "prefix cache", "dtype",
        "logp_diff_stop (now 0.01; 0: never stop)",
    ):  # fmt: skip
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        ({}, 1e-2),
        ({"dtype": torch.bfloat16}, 0.5),
        ({"dtype": torch.float16}, 0.5),
        ({"mixed_precision": "bf16"}, 0.5),
        ({"logp_diff_stop": 0.2}, 0.2),
    ],
    ids=["float32", "bf16 weights", "fp16 weights", "autocast", "as set"],
)
def test_the_threshold_follows_the_precision(settings, stop, tmp_path):
    check = make_check(tmp_path, **settings)
    judge(check, [[0.98 * stop]])
    with pytest.raises(SamplerMismatch):
        judge(check, [[1.02 * stop]])


def test_a_stop_of_zero_is_never(tmp_path, caplog):
    judge(make_check(tmp_path, logp_diff_stop=0.0), [[99.0]])
    assert "by 99 on average" in caplog.text
    caplog.clear()
    judge(make_check(tmp_path, logp_diff_stop=0.0, logp_diff_warn=0.0), [[99.0]])
    assert not caplog.records


def test_a_small_difference_warns_the_first_tenth_and_hundredth_time(tmp_path, caplog):
    check, warned = make_check(tmp_path, logp_diff_warn=1e-3), []
    for step in range(1, 120):
        judge(check, [[0.0009 if step < 5 else 0.002]])
        if caplog.records:
            assert "by 0.002 on average" in caplog.text
            warned.append(step - 4)
        caplog.clear()
    assert warned == [1, 10, 100]


EDGE = -math.log(0.8)  # of what top_p=0.8 can add to a log-prob


@pytest.mark.parametrize(
    ("settings", "fine", "wrong"),
    [
        ({}, [0.0], [EDGE, -EDGE]),
        ({"top_p": 0.8}, [0.0, EDGE / 2, EDGE], [-0.02, EDGE + 0.02]),
        ({"extra": {"top_p": 0.8}}, [0.0, EDGE], [-0.02, EDGE + 0.02]),
        ({"top_p": 0.8, "extra": {"top_p": 1.0}}, [0.0], [EDGE]),
        ({"top_k": 5}, [0.0, 3.0], [-0.02]),
        ({"min_p": 0.1}, [0.0, 3.0], [-0.02]),
        ({"top_p": 0.8, "top_k": 5}, [0.0, 3.0], [-0.02]),
        ({"extra": {"typical_p": 0.9}}, [0.0, 3.0], [-0.02]),
        ({"use_vllm": True, "vllm_structured_outputs_regex": "a+"}, [0.0, 3.0], [-0.02]),
        ({"extra": {"top_k": -1, "frequency_penalty": 0.0}}, [0.0], [EDGE, -EDGE]),
        ({"repetition_penalty": 1.2}, [-3.0, 3.0], []),
        ({"extra": {"logit_bias": {"3": 1.0}}}, [-3.0, 3.0], []),
        ({"has_dropout": True}, [-3.0, 3.0], []),
    ],
    ids=str,
)
def test_what_sampling_itself_explains_is_no_mismatch(settings, fine, wrong, tmp_path):
    check = make_check(tmp_path, **settings)
    for diff in fine:
        judge(check, [[diff]])
    for diff in wrong:
        with pytest.raises(SamplerMismatch):
            judge(check, [[diff]])


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_a_log_prob_that_is_no_number_is_an_error(value, tmp_path):
    check = make_check(tmp_path, repetition_penalty=1.2, logp_diff_stop=0.0)
    with pytest.raises(SamplerMismatch, match="gave 2 sampled tokens a log-prob that is NaN or"):
        judge(check, [[0.0, value], [value]])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, []),
        ({"top_p": 0.9, "min_p": 0.1}, ["top_p=0.9, min_p=0.1: completions are drawn from anoth"]),
        (
            {"repetition_penalty": 1.1},
            ["repetition_penalty=1.1: completions", "with repetition_penalty=1.1."],
        ),
        ({"has_dropout": True}, ["with dropout (disable_dropout=False)."]),
    ],
    ids=["nothing", "cut", "reshaped", "dropout"],
)
def test_what_is_announced(settings, said, tmp_path, caplog):
    make_check(tmp_path, **settings).announce()
    assert len(caplog.records) == len(said)
    for record, part in zip(caplog.records, said, strict=True):
        assert part in record.getMessage()


# --- with a trainer


def sample_with(trainer, model):
    trainer.rollouts.engine = HFEngine(model, 0, autocast=trainer.accelerator.autocast)


def sampling_by(change=None):
    """The trainer samples with a copy of its first weights, changed by `change`."""

    def before(trainer):
        model = copy.deepcopy(trainer.model)
        if change is not None:
            with torch.no_grad():
                change(model)
        sample_with(trainer, model)

    return before


@pytest.mark.parametrize("fields", [
    {}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 5, "min_p": 0.05},
    {"beta": 0.0, "token_level_kl": True}, {"steps_per_generation": 2, "max_steps": 4},
    {"mask_truncated_completions": True},
], ids=str)  # fmt: skip
def test_the_policys_own_samples_agree_with_it(fields, tmp_path):
    settings = {"max_steps": 2, **fields}

    def before(trainer):
        trainer.eval_dataset = trainer.train_dataset.select(range(4))
        sample_with(trainer, trainer.model)

    trainer = train(tmp_path, before=before, **settings)
    evaluated = trainer.evaluate()
    name = "sampling/logp_diff_mean"
    found = [log[name] for log in trainer.logs if name in log]
    if "mask_truncated_completions" not in fields:  # a step may have no token then
        assert len(found) == 2  # one per rollout
    found.append(evaluated[f"eval_{name}"])
    cut = {"top_p", "top_k"} & fields.keys()
    assert all(1e-3 < d < 1 if cut else d < 1e-5 for d in found)


def one_row_off(model):
    model.lm_head.weight[9] *= 1.5


@pytest.mark.parametrize(
    "change", [one_row_off, lambda model: model.model.norm.weight.mul_(1.2)], ids=["row", "norm"]
)
def test_samples_of_other_weights_stop_the_run_before_its_update(change, tmp_path):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SamplerMismatch, match="train, after step 0, weights version 1: "):
        train(tmp_path, model=model, before=sampling_by(change))
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())


def test_an_engine_left_behind_by_an_update_stops_the_run_at_the_next(tmp_path):
    with pytest.raises(SamplerMismatch, match="train, after step 1, weights version 2: "):
        train(tmp_path, learning_rate=0.5, max_steps=3, before=sampling_by())


def test_an_evaluation_of_other_weights_is_stopped_too(tmp_path):
    trainer = train(tmp_path)
    trainer.eval_dataset = trainer.train_dataset.select(range(2))
    sampling_by(one_row_off)(trainer)
    with pytest.raises(SamplerMismatch, match="eval, after step 1, weights version "):
        trainer.evaluate()


def test_rows_that_are_not_run_are_left_out(tmp_path):
    """beta 0: the first prompt's rewards are all equal, so the trainer has no log-probs of it."""

    def before(trainer):
        sampling_by()(trainer)
        generate = trainer.rollouts.engine._generate

        def planted(*args):
            rollout = generate(*args)
            rollout.logps[:4] = [[5.0] * len(row) for row in rollout.logps[:4]]
            return rollout

        trainer.rollouts.engine._generate = planted

    trainer = train(tmp_path, reward=constant_for_first_prompt, beta=0.0, before=before)
    assert trainer.logs[0]["sampling/logp_diff_max"] < 1e-4


def test_without_log_probs_of_the_sampler_nothing_is_logged(tmp_path):
    trainer = train(tmp_path)
    assert not [name for name in trainer.logs[0] if name.startswith("sampling/")]
