"""The tokens are of the distribution that the settings ask for, and so are their log-probs."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

import pytest
import torch

from rloo_fast.rollout.engine import EngineError
from rloo_fast.rollout.hf_sampling import pick
from tests.rollout.test_hf import PROMPTS, SAMPLING, UNEQUAL, draw, make_engine


@pytest.fixture
def engine():
    return make_engine()


def full_logps(model, prompt, completion, temperature=1.0) -> torch.Tensor:  # -> (len, V)
    """Of one forward over prompt and completion, without padding or cache."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def test_pick_inverts_the_cumulated_probabilities():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    below_one = 1 - 2.0**-53
    for u, token in [(0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (below_one, 4)]:
        assert pick(probs, torch.tensor([[u]], dtype=torch.float64)).item() == token


def test_pick_never_takes_a_token_without_probability_at_the_end():
    """Sums of float32 probabilities miss 1 by more than the last uniform number does."""
    probs = torch.rand(64, 5000).softmax(-1)
    probs[:, 4000:] = 0
    u = torch.full((64, 1), 1 - 2.0**-53, dtype=torch.float64)
    assert (pick(probs * (1 - 1e-6), u) == 3999).all()


def test_tokens_are_as_frequent_as_the_model_says():
    """The first tokens, and the second ones after the commonest first."""
    engine, prompt = make_engine(), [9, 10]
    sampling = replace(SAMPLING, max_new_tokens=2, temperature=1.3, stop_token_ids=(1,))
    drawn = draw(engine, [prompt] * 4000, sampling).completion_ids
    first = torch.tensor([ids[0] for ids in drawn])
    common = first.mode().values.item()
    second = torch.tensor([ids[1] for ids in drawn if ids[0] == common])
    for before, tokens in [([], first), ([common], second)]:
        logps = full_logps(engine.model, prompt + before, [0], 1.3)[0]
        expected = logps.exp() * len(tokens)
        chi_square = ((tokens.bincount(minlength=32) - expected) ** 2 / expected).sum()
        assert chi_square < 62  # 31 degrees of freedom: exceeded once in a thousand


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_those_of_a_full_forward(temperature):
    engine = make_engine()
    rollout = draw(engine, UNEQUAL, replace(SAMPLING, temperature=temperature))
    rows = zip(UNEQUAL, rollout.completion_ids, rollout.logps, strict=True)
    for prompt, ids, logps in rows:
        expected = full_logps(engine.model, prompt, ids, temperature)
        expected = expected.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(logps), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 3, "temperature": 0.5},
        {"top_p": 0.6, "temperature": 1.5},
        {"min_p": 0.2},
        {"repetition_penalty": 4.0},
        {"extra": {"typical_p": 0.5}},
        {"extra": {"epsilon_cutoff": 0.04}},
        {"extra": {"eta_cutoff": 0.1}},
        {"extra": {"top_h": 0.5}},
        {"extra": {"suppress_tokens": [20, 21]}},
        {"extra": {"renormalize_logits": True}},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "temperature": 2.0, "extra": {"typical_p": 0.8}},
    ],
    ids=lambda settings: "-".join([*settings, *settings.get("extra", {})]),
)
def test_tokens_and_logps_are_of_transformers_own_distribution(settings):
    sampling = replace(SAMPLING, max_new_tokens=1, **settings)
    engine = make_engine()
    rollout = draw(engine, [[9, 10, 11]] * 300, sampling)
    own = {"top_k": 0, **settings, **settings.get("extra", {})}
    own.pop("extra", None)
    output = engine.model.generate(
        input_ids=torch.tensor([[9, 10, 11]]), do_sample=True, max_new_tokens=1,
        output_scores=True, return_dict_in_generate=True, **own,
    )  # fmt: skip
    expected = output.scores[0][0].log_softmax(-1)
    drawn = torch.tensor(rollout.completion_ids)[:, 0]
    torch.testing.assert_close(torch.tensor(rollout.logps)[:, 0], expected[drawn])
    assert set(drawn.tolist()) >= set((expected.exp() > 0.05).nonzero()[:, 0].tolist())


def test_logits_without_an_order_are_an_error(engine):
    engine.model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(EngineError, match="NaN"):
        draw(engine)


def test_do_sample_false_takes_the_likeliest_token(engine):
    sampling = replace(SAMPLING, temperature=0.7, extra={"do_sample": False})
    greedy = draw(engine, sampling=sampling)
    rows = zip(PROMPTS, greedy.completion_ids, greedy.logps, strict=True)
    for prompt, ids, logps in rows:
        best = full_logps(engine.model, prompt, ids, 0.7).max(-1)
        assert ids == best.indices.tolist()
        torch.testing.assert_close(torch.tensor(logps), best.values, rtol=0, atol=1e-5)


def test_min_new_tokens_holds_the_stop_tokens_back(engine):
    early = draw(engine, PROMPTS * 4)
    late = draw(engine, PROMPTS * 4, replace(SAMPLING, extra={"min_new_tokens": 6}))
    assert min(map(len, early.completion_ids)) < 6
    assert min(map(len, late.completion_ids)) == 7  # the stop token is the seventh


def test_beams_are_left_to_transformers(engine, caplog):
    sampling = replace(SAMPLING, extra={"num_beams": 3})
    before = torch.random.get_rng_state()
    first = draw(engine, sampling=sampling)
    assert torch.random.get_rng_state().equal(before)
    assert first.logps is None
    assert draw(engine, sampling=sampling) == first
    assert draw(engine, sampling=sampling, first_seed=50) != first
    assert caplog.text.count("no log-probs of the sampler") == 1


@pytest.mark.parametrize("extra", [{}, {"do_sample": False}, {"num_beams": 2, "do_sample": False}])
def test_transformers_has_nothing_to_warn_of(extra, engine, caplog):
    sampling = replace(SAMPLING, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, extra=extra)
    logging.getLogger("transformers").addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # renamed to `cache` in newer releases, which take both names until 6.0
        warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
        draw(engine, UNEQUAL, sampling)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
