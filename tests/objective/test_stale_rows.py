"""Rows that older weights sampled: gradients beside the formula, and what stays as it is.

rows of the policy's own weights    rho = exp(logp - old), exactly 1 on the first update
rows of older weights               rho = exp(logp - sampler), summed over t for loss rloo
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from rloo_fast.records import Rollout
from tests.objective.test_importance_sampling import Formula, Planted, planted_logp, run
from tests.parity.test_trl import Injected
from tests.step.test_update import assert_same_gradient


def versions_of(rollout: Rollout, newest: int) -> list[list[int]]:
    """A third of the rows by the newest weights, a third by older ones, a third by both."""
    found = []
    for row, ids in enumerate(rollout.completion_ids):
        first = [newest, newest - 2, newest - 1 - row % 2][row % 3]
        half = len(ids) // 2 if row % 3 == 2 else len(ids)
        found.append([first] * half + [newest] * (len(ids) - half))
    return found


class Stale(Planted):
    """Older weights sampled some of its rows, and of others their first half."""

    def _generate(self, *args):
        rollout = super()._generate(*args)
        return replace(rollout, token_versions=versions_of(rollout, self.version))


class Fresh(Planted):
    """Says of every token that the policy's own weights drew it."""

    def _generate(self, *args):
        rollout = super()._generate(*args)
        versions = [[self.version] * len(ids) for ids in rollout.completion_ids]
        return replace(rollout, token_versions=versions)


class StaleFormula(Formula):
    """The loss of a batch with rows of older weights, in plain float64 torch."""

    def __init__(self, trainer):
        super().__init__(trainer, "sequence" if trainer.args.loss == "rloo" else "token")
        rows = trainer.kept["batches"][0].stale_rows.tolist()
        self.weights = [torch.ones_like(w) for w in self.weights]
        self.old = [
            torch.tensor([planted_logp(token, t) for t, token in enumerate(ids)]).double()
            if stale
            else old
            for stale, old, (_, ids) in zip(rows, self.old, self.rows, strict=True)
        ]


@pytest.mark.parametrize(
    "fields",
    [
        {"layout": "shared_prefix"},  # advantages come out of the forward
        {"layout": "padded"},
        {"layout": "shared_prefix", "max_tokens_per_micro_batch": 20},  # groups are split
        {"token_level_kl": True},
        {"loss": "grpo"},
        {"beta": 0.0, "temperature": 0.7},
        {"mask_truncated_completions": True},
    ],
    ids=str,
)
def test_gradients_are_those_of_the_formula(fields, tmp_path):
    """On the first update, and on a second over the same samples; some ratios are clipped."""
    settings = {"num_iterations": 2, "max_steps": 2, "epsilon": 0.4, "learning_rate": 0.005}
    trainer = run(tmp_path, None, engine=Stale, **settings, **fields)
    [batch] = trainer.kept["batches"]
    assert 0 < batch.stale_rows.sum() < batch.num_rows
    assert 0 < (batch.staleness > 0).sum() < len(batch.staleness)
    assert all(log["clip_ratio/region_mean"] > 0 for log in trainer.logs)
    formula = StaleFormula(trainer)
    for gradient, log in zip(trainer.gradients, trainer.logs, strict=True):
        want = formula.gradient()
        assert_same_gradient(gradient, want)
        with torch.no_grad():
            for name, weight in formula.policy.named_parameters():
                weight -= log["learning_rate"] * want[name]


def test_the_formula_is_another_than_that_of_rows_of_the_policys_own(tmp_path):
    """So that the test above can fail: the same rows, taken for the policy's own."""
    stale, fresh = (run(tmp_path, None, engine=engine) for engine in (Stale, Fresh))
    with pytest.raises(AssertionError):
        assert_same_gradient(stale.gradients[0], fresh.gradients[0])


@pytest.mark.parametrize("level", [None, "token", "sequence"])
def test_versions_that_are_all_the_policys_own_change_no_bit(level, tmp_path):
    settings = {"num_iterations": 2, "max_steps": 4, "steps_per_generation": 2}
    settings["per_device_train_batch_size"] = 4
    told, untold = (run(tmp_path, level, engine=engine, **settings) for engine in (Fresh, Planted))
    for name, weight in untold.model.state_dict().items():
        assert torch.equal(told.model.state_dict()[name], weight), name
    assert [log.keys() for log in told.logs] == [log.keys() for log in untold.logs]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_ask_nobody_who_sampled(level, tmp_path):
    """The decoupled objective: the ratio is to the policy before the update, in every row."""
    settings = {"num_iterations": 2, "max_steps": 2}
    stale, plain = (run(tmp_path, level, engine=engine, **settings) for engine in (Stale, Planted))
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(stale.model.state_dict()[name], weight), name
    assert stale.logs[0]["staleness/max"] == 2
    assert "staleness/max" not in plain.logs[0]


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_the_ratio_to_the_sampler_needs_no_pass_before_the_update(beta, tmp_path):
    assert run(tmp_path, None, engine=Stale, beta=beta).policy.num_forwards == 1


def test_what_is_logged_of_them(tmp_path):
    trainer = run(tmp_path, None, engine=Stale)
    [batch], [log] = trainer.kept["batches"], trainer.logs
    lag, formula = batch.staleness.double(), StaleFormula(trainer)
    assert log["staleness/mean"] == pytest.approx(lag.mean().item())
    assert log["staleness/max"] == lag.max() == 2
    assert log["staleness/frac_stale_tokens"] == pytest.approx((lag > 0).double().mean().item())
    ratios = torch.stack(
        [r for r, stale in zip(formula.ratios, batch.stale_rows, strict=True) if stale]
    )
    assert log["sampling/importance_raw_max"] == pytest.approx(ratios.max().item(), rel=1e-4)
    ess = ratios.sum() ** 2 / (len(ratios) * ratios.square().sum())
    assert log["sampling/ess"] == pytest.approx(ess.item(), rel=1e-4)
    diffs = [
        torch.tensor([planted_logp(token, t) for t, token in enumerate(ids)]) - old
        for (_, ids), old in zip(formula.rows, Formula(trainer, "token").old, strict=True)
    ]
    parts = {True: "staleness/logp_diff_mean", False: "sampling/logp_diff_mean"}
    for stale, name in parts.items():
        some = [d for d, s in zip(diffs, batch.stale_rows.tolist(), strict=True) if s == stale]
        assert log[name] == pytest.approx(torch.cat(some).abs().mean().item(), rel=1e-4)


def test_a_run_resumed_between_two_passes_has_the_same_weights(tmp_path):
    """The second pass goes by versions and log-probs that are in the checkpoint alone."""
    fields = {"num_iterations": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = run(tmp_path, None, engine=Stale, **fields)

    def resumed(trainer):
        trainer.rollouts.engine = None
        checkpoint = str(tmp_path / "checkpoint-1")
        trainer.train = functools.partial(trainer.train, resume_from_checkpoint=checkpoint)

    again = run(tmp_path, None, engine=Stale, before=resumed, **fields)
    assert len(again.gradients) == 1
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name


class StaleWithoutLogps(Injected):
    def _generate(self, *args):
        rollout = super()._generate(*args)
        return replace(rollout, token_versions=versions_of(rollout, self.version))


def test_rows_of_older_weights_without_log_probs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the rollout engine gave none: sample with the policy's"):
        run(tmp_path, None, engine=StaleWithoutLogps)
