"""The benchmark of stale rows: its engine samples from older weights, and its figures."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.staleness.lagged import Lagged
from benchmarks.staleness.lengths import measured
from benchmarks.staleness.run import table
from rloo_fast.rollout import HFEngine
from rloo_fast.weight_sync.sampler_check import SamplerMismatch
from tests.step.test_update import train


def lagging(monkeypatch, lag, tells=True):
    """`before` of a run whose engine lags; per rollout, the policy's weights, prompts, samples."""
    monkeypatch.setattr(Lagged, "lag", lag)
    monkeypatch.setattr(Lagged, "tells", tells)
    kept = []

    def before(trainer):
        ours: HFEngine = trainer.rollouts.engine
        engine = Lagged(trainer.model, 0, autocast=ours.autocast)
        generate = engine.generate

        def watched(prompt_ids, *args, **kwargs):
            weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
            kept.append((weights, prompt_ids, generate(prompt_ids, *args, **kwargs)))
            for name, p in trainer.model.named_parameters():
                assert torch.equal(p, weights[name]), name  # the policy's own are back in place
            return kept[-1][2]

        engine.generate = watched
        trainer.rollouts.engine = engine

    return before, kept


def run(tmp_path, before, **fields):
    def engine(_):
        return HFEngine(None, 0, autocast=torch.no_grad)  # pyright: ignore[reportArgumentType]

    fields = {"max_steps": 4, "learning_rate": 0.05, **fields}
    return train(tmp_path, engine=engine, before=before, **fields)


def test_the_engine_samples_from_the_weights_of_two_steps_ago_and_says_so(tmp_path, monkeypatch):
    before, kept = lagging(monkeypatch, 2)
    trainer = run(tmp_path, before)
    assert [log.get("staleness/max") for log in trainer.logs] == [None, 1, 2, 2]
    for step, (_, prompt_ids, rollout) in enumerate(kept):
        trainer.model.load_state_dict(kept[max(step - 2, 0)][0])
        prompt, ids, logps = prompt_ids[0], rollout.completion_ids[0], rollout.logps[0]
        logits = trainer.model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
        found = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert found.tolist() == pytest.approx(logps, abs=1e-5)


def test_older_weights_that_say_so_train_and_others_are_stopped(tmp_path, monkeypatch):
    before, _ = lagging(monkeypatch, 1)
    trainer = run(tmp_path, before)
    assert all("sampling/logp_diff_mean" not in log for log in trainer.logs[1:])  # none to judge
    assert max(log["staleness/logp_diff_mean"] for log in trainer.logs[1:]) > 0.1
    before, _ = lagging(monkeypatch, 1, tells=False)
    with pytest.raises(SamplerMismatch, match="older weights"):
        run(tmp_path / "untold", before)


def test_figures_over_the_length():
    log_ratio = torch.tensor([[0.1, -0.1], [0.5, 0.5]], dtype=torch.double)
    found = measured(log_ratio, 0.3)
    e = math.e
    assert found["mean_abs_log_ratio"] == pytest.approx(0.3)
    assert found["completion/ess"] == pytest.approx((1 + e) ** 2 / (2 * (1 + e * e)), abs=1e-4)
    assert found["completion/ess_capped"] == pytest.approx(9 / 10, abs=1e-4)
    assert found["completion/outside_clip"] == 0.5
    assert found["token/max"] == pytest.approx(math.exp(0.5), abs=1e-3)


def test_the_table_has_a_mean_and_a_range_of_seeds():
    rows = [
        {"loss": "a", "lag": lag, "accuracy": {"sampled": value}}
        for lag, value in ((0, 0.5), (0, 0.7), (4, 0.25))
    ]
    assert table(rows).splitlines()[1].split() == [
        "a", "0.600", "(0.500-0.700)", "0.250", "(0.250-0.250)",
    ]  # fmt: skip
