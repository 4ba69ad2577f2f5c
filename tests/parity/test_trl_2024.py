"""The options and metrics of TRL's 2024 trainer, by its names, against a float64 script.

The script (`Script`) shares nothing with the package: its log-probs come from the model's logits,
everything after them is a loop over Python numbers, its optimizer is written out.
"""

import copy
import math
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.config.names_2024 import RENAMED, Names2024
from rloo_fast.records import Rollout
from rloo_fast.reports.recorder import table_is_due
from tests.support.tiny import InjectedEngine, make_model, make_tokenizer

EOS, STOP = 1, 31
LR = 5e-5  # large steps for this model: the ratios leave the clip range
PROMPTS = ["w0 w1", "w2", "w3 w4 w5", "w6 w7"]
COMPLETIONS = [  # two per prompt; cut before they ended: the third and the last
    [8, 9, EOS], [10, 11, STOP],
    [12, 13, 14, 15, 16, 17], [18, EOS],
    [19, 20, 21, EOS], [22, 23, 24, 25, EOS],
    [EOS], [26, 27, 28, 29, 30, 7],
]  # fmt: skip
REWARDS = [1.5, -0.5, 0.25, 2.0, -3.0, 0.75, 4.0, 0.5]
BASE = {
    "rloo_k": 2,
    "kl_coef": 0.05,
    "cliprange": 0.1,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "response_length": 6,
    "total_episodes": 8,
    "temperature": 0.7,
    "learning_rate": LR,
}
ALL = {
    "normalize_reward": True, "reward_clip_range": 10.0, "whiten_rewards": True,
    "normalize_advantage": True, "missing_eos_penalty": 1.0, "stop_token": "eos",
    "stop_token_id": STOP,
}  # fmt: skip
CASES = {
    "as-it-comes": {},
    "no-kl": {"kl_coef": 0.0},
    "normalize_reward": {"normalize_reward": True},
    "normalize_reward-and-clip": {"normalize_reward": True, "reward_clip_range": 0.8},
    "clip-alone": {"reward_clip_range": 1.0},
    "whiten_rewards": {"whiten_rewards": True},
    "normalize_advantage": {"normalize_advantage": True},
    "missing_eos_penalty": {"missing_eos_penalty": 1.0, "stop_token_id": STOP},
    "token_level_kl": {"token_level_kl": True, "kl_coef": 0.5},
    "token_level_kl-scaled": {
        "token_level_kl": True,
        "kl_coef": 0.5,
        "whiten_rewards": True,
        "normalize_advantage": True,
        "cliprange": 0.021,  # at 0.02 a token's ratio lies on the edge to 1e-6
    },
    "unscorable-token_level_kl": {"unscorable": 2, "token_level_kl": True, "kl_coef": 0.5},
    "all": ALL,
}
ONE_UPDATE = {"num_ppo_epochs": 1, "num_mini_batches": 1, "per_device_train_batch_size": 4}


class Fixed(InjectedEngine):
    """An engine that returns COMPLETIONS, whatever it is asked."""

    def _generate(self, prompt_ids, sampling, seeds, on_finished):
        assert len(prompt_ids) == len(COMPLETIONS)
        ended = [ids[-1] in (EOS, STOP) for ids in COMPLETIONS]
        return Rollout([list(c) for c in COMPLETIONS], ["stop" if e else "length" for e in ended])


def fixed_reward(completion_ids, **kwargs):
    return [REWARDS[COMPLETIONS.index(list(ids))] for ids in completion_ids]


def make_trainer(out, reward=fixed_reward, **options):
    args = RLOOConfig(
        output_dir=str(out),
        **{
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "optim": "sgd",
            "max_grad_norm": 1e9,  # the norm is logged, nothing is clipped
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "shuffle_dataset": False,
            **BASE,
            **options,
        },
    )
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    return RLOOTrainer(make_model(0), reward, args, dataset, processing_class=make_tokenizer())


def trained(out, unscorable=None, **options):
    """(logs of every step, the rows of every step and of its micro-batches, final weights)"""

    def reward(completion_ids, **kwargs):
        values = fixed_reward(completion_ids)
        return [None if i == unscorable else value for i, value in enumerate(values)]

    trainer = make_trainer(out, reward, **options)
    trainer.rollouts.engine = Fixed()
    if trainer.reference is not None:  # so that the KL is not 0
        trainer.reference.model.load_state_dict(make_model(1).state_dict())
        trainer.update.reference_check.is_over = True  # it is another model on purpose
    steps = []
    plan, loss = trainer.update.updater.plan, trainer.compute_loss

    def watched_plan(pieces):
        rows = [row for piece in pieces for row in piece.rows]
        steps.append(SimpleNamespace(rows=rows, batches=[]))
        return plan(pieces)

    def compute_loss(model, inputs, *args, **kwargs):
        steps[-1].batches.append(list(inputs.micro_batch.rows))
        return loss(model, inputs, *args, **kwargs)

    trainer.update.updater.plan, trainer.compute_loss = watched_plan, compute_loss
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    weights = {n: p.detach().double() for n, p in trainer.model.named_parameters()}
    return logs, steps, weights


class Script:
    """One rollout of the 2024 trainer in float64."""

    def __init__(self, **options):
        self.__dict__.update({
            "normalize_reward": False, "reward_clip_range": None, "whiten_rewards": False,
            "normalize_advantage": False, "missing_eos_penalty": None, "token_level_kl": False,
            "unscorable": None, **BASE, **options,
        })  # fmt: skip
        self.model, self.reference = make_model(0).double(), make_model(1).double()
        self.prompts = [p for p in make_tokenizer()(PROMPTS)["input_ids"] for _ in range(2)]
        self.old = [self.log_probs(self.model, i)[0] for i in range(8)]
        self.ref = [self.log_probs(self.reference, i)[0] for i in range(8)]
        if self.kl_coef == 0:
            self.ref = self.old
        self.kl = [float((o - r).sum()) for o, r in zip(self.old, self.ref, strict=True)]
        self.scores = self.make_scores()
        shaped = [s - self.kl_coef * kl for s, kl in zip(self.scores, self.kl, strict=True)]
        self.shaped, self.scale = shaped, 1.0
        if self.whiten_rewards:
            mean, variance = np.mean(shaped), np.var(shaped, ddof=1)
            shaped = [(r - mean) / math.sqrt(variance + 1e-8) + mean for r in shaped]
            self.scale /= math.sqrt(variance + 1e-8)
        self.advantages = [r - shaped[i ^ 1] for i, r in enumerate(shaped)]  # the other of the two
        if self.normalize_advantage:
            mean, std = np.mean(self.advantages), np.std(self.advantages, ddof=1)
            self.advantages = [(a - mean) / (std + 1e-4) for a in self.advantages]
            self.scale /= std + 1e-4

    def log_probs(self, model, row):
        """(log-probs, entropies) of the completion's tokens, and the differentiable log-probs."""
        prompt, completion = self.prompts[row], COMPLETIONS[row]
        logits = model(torch.tensor([prompt + completion])).logits[0] / self.temperature
        at = logits[len(prompt) - 1 : -1]
        live = torch.stack([z[y] - torch.logsumexp(z, 0) for z, y in zip(at, completion)])  # noqa: B905
        z = at.detach().numpy()
        p = np.exp(z - z.max(1, keepdims=True))
        p = p / p.sum(1, keepdims=True)
        log_probs = np.log(p[np.arange(len(completion)), completion])
        return log_probs, -(p * np.log(p)).sum(1), live

    def make_scores(self):
        scores = [math.nan if i == self.unscorable else r for i, r in enumerate(REWARDS)]
        if self.missing_eos_penalty is not None:
            for i, ids in enumerate(COMPLETIONS):
                scores[i] -= self.missing_eos_penalty if ids[-1] not in (EOS, STOP) else 0.0
        if self.normalize_reward:
            mean, std = np.mean(scores), np.std(scores, ddof=1)
            scores = [(s - mean) / (std + 1e-8) for s in scores]
        if self.reward_clip_range is not None:
            c = self.reward_clip_range
            scores = [min(max(s, -c), c) for s in scores]
        return scores

    def clipped(self, ratio, advantage):
        """(the clipped loss, its derivative by the log of the ratio, whether the clip acts)"""
        bounded = min(max(ratio, 1 - self.cliprange), 1 + self.cliprange)
        if -advantage * bounded > -advantage * ratio:
            return -advantage * bounded, 0.0, 1.0
        return -advantage * ratio, -advantage * ratio, 0.0

    def row_loss(self, row, new):
        """(loss, dL/dlogp of every token, share clipped) of one completion."""
        difference, a = new - self.old[row], self.advantages[row]
        if math.isnan(a):  # it, or the one it is compared with, is unscorable
            return 0.0, [0.0] * len(new), 0.0
        if not self.token_level_kl:
            loss, slope, clip = self.clipped(math.exp(difference.sum()), a)
            return loss, [slope] * len(new), clip
        token_kl = self.old[row] - self.ref[row]
        parts = []
        for t in range(len(new)):
            to_go = self.scores[row] - self.kl_coef * token_kl[t:].sum()
            ahead = self.scale * (to_go - self.shaped[row])  # of the whole sequence's reward
            parts.append(self.clipped(math.exp(difference[t]), a + ahead))
        loss, slopes, clips = zip(*parts, strict=True)
        return sum(loss), list(slopes), sum(clips) / len(clips)

    def update(self, step, lr, first):
        """One optimizer step: its metrics; the weights become w - lr * gradient.

        Rows without an advantage are not run; `first`: with the weights that sampled, so that their
        entropies are known all the same.
        """
        rows, ran = step.rows, [row for batch in step.batches for row in batch]
        found = {row: self.log_probs(self.model, row) for row in rows}
        losses = {row: self.row_loss(row, found[row][0]) for row in rows}
        surrogate = sum(
            (found[row][2] * torch.tensor(losses[row][1], dtype=torch.double)).sum() for row in rows
        )
        parameters = list(self.model.parameters())
        gradients = torch.autograd.grad(surrogate / len(rows), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= lr * gradient
        log_ratio = {row: found[row][0] - self.old[row] for row in rows}
        ratios = [
            float(np.mean(np.exp(np.concatenate([log_ratio[row] for row in batch]))))
            for batch in step.batches
        ]
        return {
            "loss": np.mean([losses[row][0] for row in rows]),
            "grad_norm": math.sqrt(sum(float(g.square().sum()) for g in gradients)),
            "policy/approxkl_avg": np.mean([0.5 * log_ratio[row].sum() ** 2 for row in ran]),
            "policy/clipfrac_avg": np.mean([losses[row][2] for row in rows]),
            "loss/policy_avg": np.mean([losses[row][0] for row in rows]),
            "policy/entropy_avg": np.mean(
                np.concatenate([found[row][1] for row in (rows if first else ran)])
            ),
            "val/ratio": np.mean(ratios),
            "val/ratio_var": np.var(ratios, ddof=1) if len(ratios) > 1 else 0.0,
            "lr": lr,
            "episode": 8,
        }

    def rollout_metrics(self):
        return {
            "objective/kl": np.mean(self.kl),
            "objective/entropy": np.mean([-old.sum() for old in self.old]),
            "objective/non_score_reward": np.mean([-self.kl_coef * kl for kl in self.kl]),
            "objective/rlhf_reward": np.nanmean(self.shaped),
            "objective/scores": np.nanmean(self.scores),
            "val/num_eos_tokens": sum(ids[-1] in (EOS, STOP) for ids in COMPLETIONS),
        }


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request, tmp_path_factory):
    logs, steps, weights = trained(tmp_path_factory.mktemp("run"), **request.param)
    script = Script(**request.param)
    # linear decay over the run's four optimizer steps
    wanted = [script.update(step, LR * (4 - i) / 4, first=i == 0) for i, step in enumerate(steps)]
    return SimpleNamespace(logs=logs, steps=steps, weights=weights, script=script, wanted=wanted)


def assert_equal(got, wanted, names):
    for name in names:
        assert got[name] == pytest.approx(wanted[name], rel=2e-4, abs=2e-5), name


def test_loss_and_gradient_of_every_step(case):
    assert len(case.logs) == 4
    for got, wanted in zip(case.logs, case.wanted, strict=True):
        assert_equal(got, wanted, ("loss", "grad_norm"))


def test_metrics_of_every_update(case):
    for got, wanted in zip(case.logs, case.wanted, strict=True):
        assert_equal(got, wanted, [name for name in wanted if "/" in name])


def test_metrics_of_the_rollout(case):
    wanted = case.script.rollout_metrics()
    assert_equal(case.logs[0], wanted, wanted)


def test_learning_rate_and_episodes(case):
    for got, wanted in zip(case.logs, case.wanted, strict=True):
        assert got["lr"] == pytest.approx(wanted["lr"], rel=1e-6)
        assert got["episode"] == wanted["episode"]


def test_change_of_the_weights(case):
    start = dict(make_model(0).named_parameters())
    for name, parameter in case.script.model.named_parameters():
        wanted = (parameter - start[name]).detach()
        got = (case.weights[name] - start[name]).detach()
        assert (got - wanted).norm() <= 2e-3 * wanted.norm() + 1e-6, name


def test_two_mini_batches_of_whole_groups_in_each_of_two_epochs(case):
    assert [len(step.rows) for step in case.steps] == [4] * 4
    for epoch in (case.steps[:2], case.steps[2:]):
        assert sorted(row for step in epoch for row in step.rows) == list(range(8))
    for step in case.steps:
        assert {row ^ 1 for row in step.rows} == set(step.rows)
        ran = sorted(row for batch in step.batches for row in batch)
        # without an advantage there is nothing to run it for
        assert ran == sorted(r for r in step.rows if not math.isnan(case.script.advantages[r]))


def test_several_micro_batches_are_among_the_steps(case):
    """Else their mean ratios would not be told apart."""
    assert max(len(step.batches) for step in case.steps) > 1


def test_the_clip_acts_on_some_completions(case):
    """Else the cases above would not test it."""
    assert any(0 < wanted["policy/clipfrac_avg"] < 1 for wanted in case.wanted)


@pytest.mark.parametrize("options", [
    {}, {"kl_coef": 0.0}, {"kl_coef": 0.5, "missing_eos_penalty": 1.0},
    {"token_level_kl": True, "kl_coef": 0.5}, CASES["unscorable-token_level_kl"], ALL,
], ids=str)  # fmt: skip
def test_one_update_per_rollout(tmp_path, options):
    """On-policy: no pass over the completions before the update where none is needed."""
    options = {**ONE_UPDATE, **options}
    (got,), (step,), _ = trained(tmp_path, **options)
    script = Script(**options)
    wanted = {**script.update(step, LR, first=True), **script.rollout_metrics()}
    assert_equal(got, wanted, [name for name in wanted if name != "lr"])


# --- the names


def config(**options):
    return RLOOConfig(output_dir="out", use_cpu=True, report_to="none", **options)


NEW = {
    "rloo_k": 4, "kl_coef": 0.3, "cliprange": 0.1, "num_ppo_epochs": 3, "response_length": 53,
    "normalize_reward": True, "normalize_advantage": True, "local_rollout_forward_batch_size": 5,
}  # fmt: skip


def settings_of(args):
    old_names = {f.name for f in fields(Names2024)}
    return {f.name: getattr(args, f.name) for f in fields(args) if f.name not in old_names}


@pytest.mark.parametrize("old", NEW)
def test_an_old_name_gives_the_configuration_of_the_new_one(old):
    assert settings_of(config(**{old: NEW[old]})) == settings_of(config(**{RENAMED[old]: NEW[old]}))


@pytest.mark.parametrize("old", NEW)
def test_an_old_name_changes_the_configuration(old):
    assert settings_of(config(**{old: NEW[old]})) != settings_of(config())


def test_every_renamed_field_is_tested():
    assert NEW.keys() == RENAMED.keys()


def test_num_mini_batches_is_steps_per_generation_over_accumulation():
    old = config(gradient_accumulation_steps=3, num_mini_batches=2)
    assert settings_of(old) == settings_of(
        config(gradient_accumulation_steps=3, steps_per_generation=6)
    )


@pytest.mark.parametrize("old", [n for n, v in NEW.items() if not isinstance(v, bool)])
def test_old_and_new_name_that_disagree(old):
    with pytest.raises(ValueError, match=f"{old}=.* and {RENAMED[old]}=.* say the same thing"):
        config(**{old: NEW[old], RENAMED[old]: NEW[old] * 3})


@pytest.mark.parametrize("old", NEW)
def test_old_and_new_name_that_agree(old):
    config(**{old: NEW[old], RENAMED[old]: NEW[old]})


@pytest.mark.parametrize(("options", "message"), [
    ({"num_mini_batches": 2, "steps_per_generation": 3}, "num_mini_batches=2 means"),
    ({"num_mini_batches": 0}, "num_mini_batches must be an integer >= 1"),
    ({"total_episodes": 64, "max_steps": 3}, "total_episodes=64 means 8 optimizer steps"),
    ({"stop_token": "period"}, "stop_token must be 'eos'"),
    ({"ds3_gather_for_generation": False}, "ds3_gather_for_generation=False is refused"),
    ({"reward_clip_range": -1.0}, "reward_clip_range must be"),
], ids=str)  # fmt: skip
def test_what_cannot_be_carried_out_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_every_name_at_once():
    args = config(
        rloo_k=4, kl_coef=0.1, cliprange=0.3, num_ppo_epochs=2, num_mini_batches=2,
        response_length=20, token_level_kl=True, total_episodes=64, missing_eos_penalty=1.0,
        stop_token="eos", stop_token_id=7, num_sample_generations=3, normalize_reward=True,
        reward_clip_range=5.0, whiten_rewards=True, normalize_advantage=True,
        local_rollout_forward_batch_size=3, ds3_gather_for_generation=True,
    )  # fmt: skip
    assert (args.num_generations, args.beta, args.epsilon, args.num_iterations) == (4, 0.1, 0.3, 2)
    assert (args.steps_per_generation, args.max_completion_length) == (2, 20)
    assert (args.generation_batch_size, args.max_steps) == (16, 16)
    assert args.reward_clip_range == [-5.0, 5.0]


# --- sizes


@pytest.fixture
def eight_processes(monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 8))


def test_a_generation_batch_of_4096(eight_processes):
    """16 per device x 16 accumulated x 2 mini-batches x 8 processes."""
    args = config(
        per_device_train_batch_size=16, gradient_accumulation_steps=16, num_mini_batches=2, rloo_k=4
    )
    assert args.generation_batch_size == 4096
    assert args.prompts_per_generation == 1024
    assert args.local_generation_size == 512
    assert args.micro_steps_per_update == 16


@pytest.mark.parametrize(("episodes", "epochs", "mini_batches", "steps"), [
    (1_000_000, 4, 2, 245 * 4 * 2),  # 244.1 batches of 4096 are 245
    (4096, 1, 2, 2),
    (4097, 1, 2, 4),
    (2048, 3, 1, 3),
])  # fmt: skip
def test_episodes_are_completions(eight_processes, episodes, epochs, mini_batches, steps):
    args = config(
        per_device_train_batch_size=16, gradient_accumulation_steps=16, rloo_k=2,
        num_mini_batches=mini_batches, num_ppo_epochs=epochs, total_episodes=episodes,
    )  # fmt: skip
    assert args.max_steps == steps


# --- what the names do in a run


def test_stop_token_id_ends_completions_beside_eos(tmp_path):
    trainer = make_trainer(tmp_path, stop_token="eos", stop_token_id=STOP)
    assert trainer.collector.sampling.stop_token_ids == (EOS, STOP)


def due_steps(num_tables, max_steps):
    """Steps after which the table is printed."""
    steps = range(1, max_steps + 1)
    return [done for done in steps if table_is_due(done, max_steps, num_tables)]


@pytest.mark.parametrize("max_steps", [1, 7, 10, 100])
@pytest.mark.parametrize("num_tables", [0, 1, 3, 4, 7, 10, 33])
def test_as_many_tables_as_asked_for(num_tables, max_steps):
    assert len(due_steps(num_tables, max_steps)) == min(num_tables, max_steps)


def test_tables_are_spread_evenly():
    assert due_steps(4, 10) == [3, 5, 8, 10]


def test_tables_of_a_run_are_printed(tmp_path):
    trainer = make_trainer(tmp_path, num_sample_generations=3)
    trainer.rollouts.engine = Fixed()
    printed = []
    trainer.recorder.print_completions = printed.append
    trainer.train()
    assert printed == due_steps(3, trainer.state.max_steps)
    assert len(trainer.recorder.samples.table("train", step=1)) > 0


def watch_rows(trainer):
    """Rows of every generate call; tokens of every forward outside of them, by gradient mode."""
    rows = {"prompts": [], "generate": [], "no_grad": [], "update": []}
    generating = []

    def note(module, args, kwargs):
        if not generating:
            kind = "update" if torch.is_grad_enabled() else "no_grad"
            rows[kind].append(kwargs["input_ids"].numel())

    for model in (trainer.model, trainer.reference.model):
        model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    generate = trainer.model.generate

    def watched(**kwargs):
        ahead = kwargs["generation_config"].max_new_tokens == 1  # prompts, once for their samples
        rows["prompts" if ahead else "generate"].append(len(kwargs["input_ids"]))
        generating.append(True)
        out = generate(**kwargs)
        generating.pop()
        return out

    trainer.model.generate = watched
    return rows


@pytest.mark.parametrize("limit", [1, 3])
def test_local_rollout_forward_batch_size_limits_rows(tmp_path, limit):
    trainer = make_trainer(
        tmp_path, reward=lambda completions, **kwargs: [float(len(c)) for c in completions],
        local_rollout_forward_batch_size=limit, layout="padded", kl_coef=0.05,
    )  # fmt: skip
    rows = watch_rows(trainer)
    longest = []
    prepare = trainer.update.preparer.with_reference

    def watched(batch, wrapped):
        longest.append(batch.generation.sizes.longest_row)
        return prepare(batch, wrapped)

    trainer.update.preparer.with_reference = watched
    trainer.train()
    assert max(rows["generate"] + rows["prompts"]) == limit
    assert rows["generate"] == [limit] * (8 // limit) + [8 % limit] * (8 % limit > 0)
    tokens = max(longest)
    assert limit * tokens // 2 < max(rows["no_grad"]) <= limit * tokens
    assert limit == 3 or max(rows["update"]) > tokens  # goes by per_device_train_batch_size


def test_local_rollout_forward_batch_size_does_not_change_the_update(tmp_path):
    runs = [
        trained(tmp_path / str(limit), local_rollout_forward_batch_size=limit)
        for limit in (None, 3)
    ]
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert_equal(a, b, [n for n in a if n.startswith(("loss", "grad", "objective", "policy"))])
    for name, weight in runs[0][2].items():
        torch.testing.assert_close(weight, runs[1][2][name], rtol=1e-4, atol=1e-6)


def test_local_rollout_forward_batch_size_does_not_change_greedy_completions(tmp_path):
    texts = []
    for limit in (None, 3):
        seen = []
        trainer = make_trainer(
            tmp_path / str(limit),
            reward=lambda completion_ids, seen=seen, **kwargs: (
                seen.extend(completion_ids) or [float(i) for i in range(len(completion_ids))]
            ),
            generation_kwargs={"do_sample": False},
            local_rollout_forward_batch_size=limit,
        )
        trainer.train()
        texts.append(copy.deepcopy(seen))
    assert texts[0] == texts[1]
