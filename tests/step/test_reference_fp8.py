"""reference_head_fp8: the reference's log-probs come out of fp8, and none of the policy's."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from peft import LoraConfig

from rloo_fast import RLOOConfig
from rloo_fast.policy import forward
from tests.support.kill_resume import make_trainer

FP8 = {"reference_head_fp8": True, "beta": 0.1}


@pytest.fixture
def calls(monkeypatch):
    """[the op, whether gradients were enabled] of every call of a head."""
    found = []

    def recorded(name):
        op = getattr(forward, name)

        def call(*args, **kwargs):
            found.append((name, torch.is_grad_enabled()))
            return op(*args, **kwargs)

        monkeypatch.setattr(forward, name, call)

    for name in ("linear_logprob", "reference_logprob_fp8", "fused_linear_rloo_loss"):
        recorded(name)
    return found


def trained(tmp_path, **settings):
    trainer = make_trainer(tmp_path, max_steps=1, **settings)
    trainer.train()
    return trainer


def heads(calls):
    """How often each op ran."""
    return Counter(name for name, _ in calls)


def test_effect_of_reference_head_fp8(tmp_path, calls):
    plain = trained(tmp_path / "plain", beta=0.1)
    before = heads(calls)
    assert not before["reference_logprob_fp8"]
    calls.clear()
    near = trained(tmp_path / "fp8", **FP8)
    # in place of the reference's pass, and of that alone
    assert heads(calls) == before + Counter(reference_logprob_fp8=1) - Counter(linear_logprob=1)
    assert {x for x in calls if x[1]} == {("fused_linear_rloo_loss", True)}
    kl, exact = (t.state.log_history[0]["objective/kl"] for t in (near, plain))
    assert abs(exact) < 1e-4  # before the first update the two are one
    assert 0 < abs(kl) < 0.3


def test_the_policys_pass_without_gradients_is_not_in_fp8(tmp_path, calls):
    trained(tmp_path / "1", **FP8)
    once = heads(calls)
    calls.clear()
    trained(tmp_path / "2", **FP8, normalize_advantages=True)
    assert heads(calls) == once + Counter(linear_logprob=1)


def test_with_adapters_the_policys_frozen_head_is_the_references(tmp_path, calls):
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    trained(tmp_path, **FP8, peft_config=lora)
    assert {x for x in calls if x[0] != "linear_logprob"} == {
        ("reference_logprob_fp8", False), ("fused_linear_rloo_loss", True),
    }  # fmt: skip


def test_a_head_that_is_no_plain_layer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rloo_fast.step.build.why_own_logits", lambda model: "its logits differ from its head's"
    )
    with pytest.raises(ValueError, match="fp8=True cannot be used: the model's own"):
        make_trainer(tmp_path, max_steps=1, **FP8)


def test_a_configuration_that_cannot_be_carried_out_is_refused(tmp_path, monkeypatch):
    settings = {"use_cpu": True, "reference_head_fp8": True}
    with pytest.raises(ValueError, match="no effect with beta=0, which keeps no reference model"):
        RLOOConfig(str(tmp_path), **settings, beta=0.0)
    monkeypatch.setattr("rloo_fast.config.checks.why_no_fp8", lambda device: f"{device} has none")
    with pytest.raises(ValueError, match="reference_head_fp8=True cannot be used here: cpu has no"):
        RLOOConfig(str(tmp_path), **settings)
