"""Truncated importance sampling: gradients beside the formula in float64, and what stays as it is.

    w_it = min(exp(old_it - sampler_it), cap)      w_i = min(exp(sum_t (old_it - sampler_it)), cap)
sequence:  - mean_i min(rho_i w_i A_i, clip(rho_i) w_i A_i)
token:     - mean_i sum_t min(rho_it w_it A_i, clip(rho_it) w_it A_i)
loss grpo: - mean_i mean_t (min(rho_it w A_i, clip(rho_it) w A_i) - beta rho_it k3_it), with
           w = w_i or w_it
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch

from tests.parity.test_trl import EOS, Injected, Recorder
from tests.step.test_update import assert_same_gradient, constant_for_first_prompt, train

LEVELS = ["token", "sequence"]


def planted_logp(token: int, place: int) -> float:
    return -3.8 - 0.7 * ((token * 5 + place * 3) % 7 - 3) / 3


class Planted(Injected):
    """Says of its completions that they were drawn with `planted_logp`."""

    def _generate(self, *args):
        rollout = super()._generate(*args)
        logps = [
            [planted_logp(token, t) for t, token in enumerate(ids)]
            for ids in rollout.completion_ids
        ]
        return replace(rollout, logps=logps)


def run(tmp_path, level, *, before=None, **fields):
    """A run with planted sampler log-probs, after its policy has moved away from its reference;
    with its first generation batch, its models as they were before it, and all its gradients."""
    kept = {"batches": [], "settled": []}

    def prepare(trainer):
        kept["reference"] = copy.deepcopy(trainer.model).double()
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        kept["policy"] = copy.deepcopy(trainer.model).double()
        add = trainer.buffer.add

        def keep(batch):
            kept["batches"].append(batch.generation)
            add(batch)

        settle = trainer.buffer.replace

        def keep_settled(pieces):
            kept["settled"] += [piece.batch for piece in pieces]
            settle(pieces)

        trainer.buffer.add, trainer.buffer.replace = keep, keep_settled
        if before is not None:
            before(trainer)

    settings = {
        "engine": Planted, "logp_diff_stop": 0.0, "logp_diff_warn": 0.0,
        "truncated_importance_sampling": level, **fields,
    }  # fmt: skip
    trainer = train(tmp_path, before=prepare, **settings)
    recorder = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Recorder))
    trainer.gradients, trainer.kept = recorder.gradients, kept
    return trainer


# --- the formula


def row_logps(model, prompt, completion, temperature):
    logits = model(torch.tensor([prompt + completion])).logits[0] / temperature
    picked = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return picked.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def leave_one_out(rewards, k):
    return [
        r - sum(rewards[j] for j in range(i // k * k, i // k * k + k) if j != i) / (k - 1)
        for i, r in enumerate(rewards)
    ]


class Formula:
    """The rows of a generation batch, and their loss in plain float64 torch."""

    def __init__(self, trainer, level):
        self.args, self.level = trainer.args, level
        self.grpo = trainer.args.loss == "grpo"
        batch, self.policy = trainer.kept["batches"][0], trainer.kept["policy"]
        self.rows = list(zip(batch.prompt_ids, batch.completion_ids, strict=True))
        self.counted = [n > 0 for n in batch.num_tokens]  # others are cut off, and masked
        with torch.no_grad():
            self.old = self.logps(self.policy)
            reference = self.reference = self.logps(trainer.kept["reference"])
        parts = zip(self.old, reference, self.counted, strict=True)
        kl = [(o - r) * counted for o, r, counted in parts]
        beta, k = 0.0 if self.grpo else self.args.beta, self.args.num_generations
        shaped = [
            s - beta * float(row.sum()) for s, row in zip(batch.scores.tolist(), kl, strict=True)
        ]
        self.advantages = [
            a + beta * (row.cumsum(0) - row) if self.args.token_level_kl else torch.tensor(a)
            for a, row in zip(leave_one_out(shaped, k), kl, strict=True)
        ]
        sampler = [
            torch.tensor([planted_logp(token, t) for t, token in enumerate(ids)]).double()
            for _, ids in self.rows
        ]
        self.ratios = [
            (o - s if level == "token" else (o - s).sum()).exp()
            for o, s in zip(self.old, sampler, strict=True)
        ]
        cap = self.args.importance_sampling_cap
        self.weights = [ratio.clamp(max=cap) for ratio in self.ratios]

    def logps(self, model):
        return [row_logps(model, *row, self.args.temperature) for row in self.rows]

    def gradient(self):
        """Of the policy as it is now; the ratio is to the policy that sampled."""
        by_token = self.level == "token" or self.args.token_level_kl or self.grpo
        losses, epsilon = [], self.args.epsilon
        for logps, old, ref, a, w, counted in zip(
            self.logps(self.policy), self.old, self.reference, self.advantages, self.weights,
            self.counted, strict=True,
        ):  # fmt: skip
            rho = (logps - old if by_token else (logps - old).sum()).exp()
            objective = torch.minimum(rho * a, rho.clamp(1 - epsilon, 1 + epsilon) * a)
            loss = -w * objective
            if self.grpo:
                k3 = (ref - logps).exp() - (ref - logps) - 1
                loss = (loss + self.args.beta * rho * k3) / len(logps)
            losses.append(loss.sum() * counted)
        self.policy.zero_grad()
        torch.stack(losses).mean().backward()
        return {n: p.grad.clone() for n, p in self.policy.named_parameters()}

    def metrics(self):
        pairs = zip(self.ratios, self.counted, strict=True)
        ratios = torch.cat([r.reshape(-1) for r, counted in pairs if counted])
        cap = self.args.importance_sampling_cap
        return {
            "sampling/importance_raw_mean": ratios.mean().item(),
            "sampling/importance_raw_max": ratios.max().item(),
            "sampling/importance_clipped_mean": ratios.clamp(max=cap).mean().item(),
            "sampling/frac_clipped": (ratios >= cap).double().mean().item(),
            "sampling/ess": float(
                ratios.clamp(max=cap).mean() ** 2 / ratios.clamp(max=cap).square().mean()
            ),
        }


@pytest.mark.parametrize(
    "fields",
    [
        {"layout": "shared_prefix"},
        {"layout": "padded"},
        {"layout": "shared_prefix", "max_tokens_per_micro_batch": 20},
        {"importance_sampling_cap": 1e9},
        {"token_level_kl": True},
        {"loss": "grpo"},
        {"beta": 0.0, "temperature": 0.7},
        {"mask_truncated_completions": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("level", LEVELS)
def test_gradients_are_those_of_the_formula(level, fields, tmp_path):
    """On the first update, and on a second over the same samples, with ratios that are clipped."""
    settings = {"importance_sampling_cap": 1.2, "num_iterations": 2, "max_steps": 2, **fields}
    trainer = run(tmp_path, level, epsilon=0.02, learning_rate=0.005, **settings)
    formula = Formula(trainer, level)
    clipped = formula.metrics()["sampling/frac_clipped"]
    assert clipped == 0 if "importance_sampling_cap" in fields else 0 < clipped < 1
    assert trainer.logs[1]["clip_ratio/region_mean"] > 0
    for gradient, log in zip(trainer.gradients, trainer.logs, strict=True):
        want = formula.gradient()
        assert_same_gradient(gradient, want)
        with torch.no_grad():
            for name, weight in formula.policy.named_parameters():
                weight -= log["learning_rate"] * want[name]


@pytest.mark.parametrize("fields", [{}, {"mask_truncated_completions": True}], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_logged_of_the_weights(level, fields, tmp_path):
    trainer = run(tmp_path, level, importance_sampling_cap=1.2, **fields)
    for name, value in Formula(trainer, level).metrics().items():
        assert trainer.logs[0][name] == pytest.approx(value, rel=1e-4), name


# --- what it leaves as it is


def agreeing(trainer):
    """The sampler's log-probs become those of the trainer, to the bit."""
    first_pass = trainer.update.preparer.with_old_logps

    def same(batch, wrapped):
        batch = first_pass(batch, wrapped)
        agreeing = replace(batch.generation, sampler_logps=batch.old_logps.clone())
        return replace(batch, generation=agreeing)

    trainer.update.preparer.with_old_logps = same


@pytest.mark.parametrize("level", LEVELS)
def test_where_sampler_and_trainer_agree_it_changes_nothing(level, tmp_path):
    """Two generation batches of two steps each; per token, the ratio's clip is another in the
    second step of a batch, but nothing is clipped here."""
    settings = {"steps_per_generation": 2, "max_steps": 4, "per_device_train_batch_size": 4}
    if level == "token":
        settings["max_steps"] = 1
    weighted = run(tmp_path, level, before=agreeing, **settings)
    plain = run(tmp_path, None, **settings)
    for ours, theirs in zip(weighted.gradients, plain.gradients, strict=True):
        assert_same_gradient(ours, theirs)
    if level == "sequence":
        assert all(
            torch.equal(w, plain.model.state_dict()[n])
            for n, w in weighted.model.state_dict().items()
        )
    assert weighted.logs[0]["sampling/importance_raw_mean"] == 1
    assert weighted.logs[0]["sampling/frac_clipped"] == 0


@pytest.mark.parametrize("level", LEVELS)
def test_rewards_kl_and_advantages_are_logged_without_weights(level, tmp_path):
    weighted, plain = run(tmp_path, level), run(tmp_path, None)
    names = [
        name for name in plain.logs[0]
        if name.startswith(("reward", "objective/", "completions/", "sampling/")) or name == "kl"
    ]  # fmt: skip
    assert "sampling/logp_diff_mean" in names
    for name in set(names) - {"objective/entropy"}:
        assert weighted.logs[0][name] == pytest.approx(plain.logs[0][name], rel=1e-4), name
    advantages = [t.kept["settled"][0].advantages for t in (weighted, plain)]
    torch.testing.assert_close(*advantages, rtol=1e-4, atol=1e-5)
    assert weighted.logs[0]["loss"] != pytest.approx(plain.logs[0]["loss"], rel=1e-2)


def test_the_entropy_of_rows_that_are_not_run_is_that_of_the_pass_before(tmp_path):
    results = []

    def watched(trainer):
        attempt = trainer.update.updater.attempt
        trainer.update.updater.attempt = lambda *a: results.append(attempt(*a)) or results[-1]

    run(tmp_path, "token", reward=constant_for_first_prompt, beta=0.0, before=watched)
    (result,) = results
    known = result.pieces[0].batch.old_entropy[result.pieces[0].rows]
    left_out = result.rows.ran == 0
    assert 0 < left_out.sum() < len(known)
    assert torch.equal(result.rows.entropy[left_out], known[left_out])


@pytest.mark.parametrize("level", LEVELS)
def test_evaluation_has_the_weighted_loss(level, tmp_path):
    def evaluated(trainer):
        trainer.eval_dataset = trainer.train_dataset.select(range(2))

    fields = {"max_steps": 1, "learning_rate": 0.0, "per_device_eval_batch_size": 8}
    trainer = run(tmp_path, level, before=evaluated, **fields)
    trainer.rollouts.engine.calls = 0  # as in training
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(trainer.logs[0]["loss"], rel=1e-3, abs=1e-5)
    assert found["eval_sampling/frac_clipped"] == trainer.logs[0]["sampling/frac_clipped"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_run_resumed_between_two_passes_has_the_same_weights(level, tmp_path):
    """The second pass weights by log-probs that are in the checkpoint alone."""
    fields = {"num_iterations": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = run(tmp_path, level, **fields)

    def resumed(trainer):
        trainer.rollouts.engine = None
        checkpoint = str(tmp_path / "checkpoint-1")
        trainer.train = functools.partial(trainer.train, resume_from_checkpoint=checkpoint)

    again = run(tmp_path, level, before=resumed, **fields)
    assert len(again.gradients) == 1
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name


@pytest.mark.parametrize("level", LEVELS)
def test_groups_without_signal_are_still_not_run(level, tmp_path):
    trainer = run(tmp_path, level, reward=constant_for_first_prompt, beta=0.0)
    assert trainer.logs[0]["update/frac_groups_not_run"] == 0.5


@pytest.mark.parametrize(("level", "forwards"), [(None, 1), ("token", 2), ("sequence", 2)])
def test_only_with_it_the_policy_is_run_before_the_update(level, forwards, tmp_path):
    assert run(tmp_path, level).policy.num_forwards == forwards


@pytest.mark.parametrize("level", LEVELS)
def test_an_engine_without_log_probs_is_refused(level, tmp_path):
    with pytest.raises(ValueError, match=f"truncated_importance_sampling='{level}' needs the log-"):
        run(tmp_path, level, engine=Injected)


def test_masked_completions_are_among_those_tested():
    samples = Planted(4).ids([[7, 8, 9]] * 8)
    assert {ids[-1] == EOS for ids in samples} == {True, False}
