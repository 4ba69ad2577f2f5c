"""The update: how many forwards it runs, and what its gradient does not depend on."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.models.adapters import base_causal_lm
from rloo_fast.models.dropout import has_dropout
from rloo_fast.policy.layout_probe import choose_layout
from rloo_fast.records import Rollout
from rloo_fast.reports.metric_names import is_timing
from tests.parity.test_trl import MAX_NEW, Injected, Recorder, first_reward
from tests.support.tiny import make_model, make_tokenizer

pytestmark = pytest.mark.slow

PROMPTS = Dataset.from_dict(
    {"prompt": [" ".join(f"w{(i * 7 + j) % 26}" for j in range(4 + i % 9)) for i in range(16)]}
)


class AllTruncated(Injected):
    def _generate(self, prompt_ids, sampling, seeds, on_finished):
        return Rollout([[7] * MAX_NEW for _ in prompt_ids], ["length"] * len(prompt_ids))


class Counter:
    """Forwards of a model and the token positions put through it, by a hook on its embedding."""

    def __init__(self, model):
        self.forwards = self.tokens = 0
        base_causal_lm(model).get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module, args, output):
        self.forwards += 1
        self.tokens += args[0].numel()


def train(
    tmp_path, engine=Injected, model=None, reward=first_reward, peft_config=None, before=None,
    **fields,
):  # fmt: skip
    """A finished run; `before(trainer)` is called ahead of training."""
    settings = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": MAX_NEW,
        "max_steps": 1, "learning_rate": 0.01, "optim": "sgd", "max_grad_norm": 0.0,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "shuffle_dataset": False, "beta": 0.2,
        "gradient_checkpointing": False, **fields,
    }  # fmt: skip
    recorder = Recorder()
    trainer = RLOOTrainer(
        model or make_model(),
        reward,
        RLOOConfig(str(tmp_path), **settings),
        PROMPTS,
        processing_class=make_tokenizer(),
        callbacks=[recorder],
        peft_config=peft_config,
    )
    trainer.rollouts.engine = engine(settings["num_generations"])
    choose_layout_now(trainer)
    if not trainer.args.torch_compile:  # the count would be compiled in
        trainer.policy_count = Counter(trainer.model)
        trainer.reference_count = Counter(trainer.reference.model) if trainer.reference else None
    if before is not None:
        before(trainer)
    trainer.train()
    trainer.gradient = recorder.gradients[0] if recorder.gradients else None
    trainer.logs = recorder.logs
    return trainer


def choose_layout_now(trainer):
    """The trial run comes before what a test counts."""
    layout, _ = choose_layout(
        trainer.args.layout, trainer.policy, trainer.model, trainer.accelerator
    )
    trainer.update.planner.layout_name = layout


@pytest.mark.parametrize(
    ("fields", "policy", "reference"),
    [
        ({}, 1, 1),
        ({"beta": 0.0}, 1, 0),
        ({"beta": 0.0, "normalize_advantages": True}, 1, 0),
        ({"gradient_accumulation_steps": 3, "layout": "padded"}, 3, 3),
        ({"gradient_accumulation_steps": 3}, 2, 2),
        ({"gradient_accumulation_steps": 3, "max_tokens_per_micro_batch": 1000}, 1, 1),
        ({"normalize_advantages": True}, 2, 1),
        ({"max_tokens_per_micro_batch": 20}, 6, 3),
        ({"num_iterations": 2, "max_steps": 2}, 2, 1),
        ({"steps_per_generation": 2, "max_steps": 2}, 3, 1),
    ],
    ids=[
        "on-policy with KL: one", "without KL: no reference", "normalised without KL: one",
        "padded: three micro-batches", "shared prefix: two hold what was three",
        "a large budget: one", "normalised with KL: two", "groups split: two",
        "two iterations: one each", "two updates per rollout: old log-probs first",
    ],
)  # fmt: skip
def test_number_of_forwards(fields, policy, reference, tmp_path):
    trainer = train(tmp_path, **fields)
    assert trainer.policy_count.forwards == policy == trainer.policy.num_forwards
    assert (trainer.reference_count.forwards if trainer.reference else 0) == reference


def injected_runs():
    """[(prompt tokens, what is run of its four samples)] of the first step's two prompts."""
    engine, found = Injected(4), []
    prompts = [row["prompt"] for row in PROMPTS.select(range(2))]
    ids = [make_tokenizer()(prompt)["input_ids"] for prompt in prompts for _ in range(4)]
    completions = engine.ids(ids)
    for i in (0, 4):
        found.append((len(ids[i]), [c[:-1] for c in completions[i : i + 4]]))
    return found


def run_once(prompt, runs):
    """None of these begin alike, but one may be the beginning of another, which it then reads."""
    kept = [
        r for i, r in enumerate(runs) if not any(o[: len(r)] == r for o in runs[:i] + runs[i + 1 :])
    ]
    return prompt + sum(map(len, kept))


TOKENS = {
    "shared_prefix": run_once,
    "packed": lambda p, runs: sum(p + len(run) for run in runs),
}


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
def test_number_of_tokens_run(layout, tmp_path):
    trainer = train(tmp_path, layout=layout)
    groups = injected_runs()
    if layout == "padded":
        want = 8 * max(p + max(map(len, runs)) for p, runs in groups)
    else:
        want = sum(TOKENS[layout](*group) for group in groups)
    assert trainer.policy_count.tokens == want == trainer.reference_count.tokens
    assert trainer.logs[0]["update/tokens_run"] == want


def assert_same_gradient(a, b, rtol=1e-5):
    largest = max(g.norm() for g in b.values())
    for name, gradient in b.items():
        assert (a[name] - gradient).norm() <= rtol * max(gradient.norm(), 1e-2 * largest), name


def move_away_from_the_reference(trainer):
    trainer.update.reference_check.is_over = True  # which would find it
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))


@pytest.fixture(scope="module")
def padded_steps(tmp_path_factory):
    """The gradient of one step with plain padded micro-batches, by settings; made once."""
    made = {}

    def get(**fields):
        key = tuple(sorted(fields.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("padded")
            made[key] = train(out, layout="padded", gradient_accumulation_steps=2, **fields)
        return made[key]

    return get


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"beta": 0.0},
        {"token_level_kl": True},
        {"normalize_advantages": True},
        {"gradient_checkpointing": True},
        {"num_iterations": 2, "max_steps": 2, "epsilon": 0.05},
        {"loss": "dapo", "advantage": "grpo", "num_iterations": 2, "max_steps": 2, "epsilon": 0.05},
    ],
    ids=[
        "beta 0.2",
        "beta 0",
        "token-level KL",
        "normalised",
        "checkpointing",
        "two iterations",
        "DAPO",
    ],
)
@pytest.mark.parametrize("budget", [None, 60, 20], ids=["default", "a group", "groups split"])
@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
def test_a_step_is_the_same_in_every_layout(layout, budget, fields, padded_steps, tmp_path):
    """Loss, gradient, weights and metrics, whatever the micro-batches."""
    want = padded_steps(**fields)
    trainer = train(
        tmp_path, layout=layout, max_tokens_per_micro_batch=budget,
        gradient_accumulation_steps=2, **fields,
    )  # fmt: skip
    assert trainer.update.planner.layout_name == layout
    assert_same_gradient(trainer.gradient, want.gradient)
    assert_same_gradient(trainer.model.state_dict(), want.model.state_dict())
    for ours, theirs in zip(trainer.logs, want.logs, strict=True):
        names = {name for name in ours | theirs if not is_timing(name)} - BY_MICRO_BATCH
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


# the 2024 trainer's are means over micro-batches; the others count what was run
BY_MICRO_BATCH = {"val/ratio", "val/ratio_var", "update/tokens_run", "update/micro_batches"}


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
def test_lora_is_the_same_in_every_layout(layout, tmp_path):
    from peft import LoraConfig

    def lora(layout):
        torch.manual_seed(0)
        settings = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return train(tmp_path, layout=layout, peft_config=settings)

    assert_same_gradient(lora(layout).gradient, lora("padded").gradient)


def checkpointing(**kwargs):
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}


@pytest.mark.parametrize("fields", [
    checkpointing(use_reentrant=False), checkpointing(use_reentrant=True),
    checkpointing(every_n_layers=2),
    pytest.param(checkpointing(offload=True), marks=[pytest.mark.gpu, pytest.mark.skipif(
        not torch.cuda.is_available(), reason="pinned memory needs a GPU"
    )]),
], ids=str)  # fmt: skip
def test_checkpointing_changes_no_gradient(fields, padded_steps, tmp_path):
    """The layers run again in backward, over the segments too."""
    if {"every_n_layers", "offload"} & fields["gradient_checkpointing_kwargs"].keys():
        minimum = "5.20"  # of transformers, which has them since
        if Version(transformers.__version__) < Version(minimum):
            pytest.skip(f"transformers {transformers.__version__} < {minimum}")
    trainer = train(tmp_path, gradient_accumulation_steps=2, **fields)
    assert trainer.update.planner.layout_name == "shared_prefix"
    assert_same_gradient(trainer.gradient, padded_steps().gradient)


def test_activations_can_be_offloaded(padded_steps, tmp_path):
    def offload(trainer):
        loss = trainer.compute_loss

        def offloaded(*args, **kwargs):
            with torch.autograd.graph.save_on_cpu():
                return loss(*args, **kwargs)

        trainer.compute_loss = offloaded

    trainer = train(tmp_path, gradient_accumulation_steps=2, before=offload)
    assert_same_gradient(trainer.gradient, padded_steps().gradient)


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_the_gradient_does_not_depend_on_the_batch_size_per_device(micro_batches, tmp_path):
    rows = {"per_device_train_batch_size": 16 // micro_batches}
    split = train(tmp_path, gradient_accumulation_steps=micro_batches, **rows)
    whole = train(tmp_path, per_device_train_batch_size=16)
    assert_same_gradient(split.gradient, whole.gradient)


def constant_for_first_prompt(completion_ids, **kwargs):
    rewards = first_reward(completion_ids)
    return [0.5] * 4 + rewards[4:]


def test_groups_without_signal_are_not_run(tmp_path):
    """beta 0: a group whose rewards are all equal has no gradient."""
    trainer = train(tmp_path, reward=constant_for_first_prompt, beta=0.0)
    assert trainer.policy_count.tokens == run_once(*injected_runs()[1])
    assert trainer.logs[0]["update/frac_groups_not_run"] == 0.5
    assert trainer.logs[0]["entropy"] > 0
    with_them = train(tmp_path, reward=constant_for_first_prompt, beta=1e-12)
    assert with_them.policy_count.tokens == sum(run_once(*group) for group in injected_runs())
    assert with_them.logs[0]["update/frac_groups_not_run"] == 0
    assert_same_gradient(trainer.gradient, with_them.gradient)


def test_a_step_without_any_signal_is_a_step_with_gradient_zero(tmp_path):
    """As if all had been run: AdamW's moments decay on, weight decay acts."""
    trainer = train(
        tmp_path, reward=lambda completions, **kwargs: [1.0] * len(completions), beta=0.0
    )
    assert trainer.policy_count.tokens == 1  # a filler
    assert trainer.gradient.keys() == dict(trainer.model.named_parameters()).keys()
    assert all((g == 0).all() for g in trainer.gradient.values())
    assert trainer.logs[0]["update/frac_groups_not_run"] == 1
    assert "entropy" not in trainer.logs[0]


def plant_out_of_memory(module, calls, message="CUDA out of memory. Tried to allocate 2.00 GiB."):
    """The calls of the policy's backbone with these numbers fail, in forward or in backward."""
    seen = {"forward": 0, "backward": 0}

    def count(kind):
        seen[kind] += 1
        if (kind, seen[kind]) in calls:
            raise torch.OutOfMemoryError(message)

    embedding = base_causal_lm(module).get_input_embeddings()
    embedding.register_forward_hook(lambda *_: count("forward"))
    embedding.register_full_backward_hook(lambda *_: count("backward"))


@pytest.mark.parametrize(
    ("calls", "fields", "halvings"),
    [
        ({("forward", 1)}, {}, 1),
        ({("backward", 1)}, {}, 1),
        ({("forward", 2)}, {"gradient_accumulation_steps": 6}, 1),
        ({("backward", 1)}, {"token_level_kl": True}, 1),
        ({("forward", 1), ("forward", 2)}, {}, 2),
        ({("forward", 1)}, {"normalize_advantages": True}, 1),
        ({("backward", 2)}, {"num_iterations": 2, "max_steps": 2}, 1),
    ],
    ids=[
        "forward", "backward", "second micro-batch", "token-level", "twice", "first pass",
        "second iteration",
    ],
)  # fmt: skip
def test_out_of_memory_halves_the_budget_and_repeats_the_step(
    calls, fields, halvings, tmp_path, caplog
):
    settings = {"max_tokens_per_micro_batch": 208, **fields}
    trainer = train(
        tmp_path, before=lambda trainer: plant_out_of_memory(trainer.model, calls), **settings
    )
    undisturbed = train(tmp_path, **settings)
    assert_same_gradient(trainer.gradient, undisturbed.gradient)
    assert trainer.logs[-1]["loss"] == pytest.approx(undisturbed.logs[-1]["loss"], abs=1e-6)
    warned = [r for r in caplog.records if r.getMessage().startswith("Out of memory: ")]
    assert (
        len(warned) == halvings == trainer.update.planner.budget.num_halvings
    )  # kept for the steps to come
    assert f"now holds {208 >> halvings} tokens at most in place of" in warned[-1].getMessage()


def test_out_of_memory_in_the_first_rollout_splits_groups_into_two_passes(tmp_path, caplog):
    """Half the budget no longer holds a group: its KL comes out of a pass of its own."""
    settings = {"max_tokens_per_micro_batch": 40}
    trainer = train(
        tmp_path, before=lambda t: plant_out_of_memory(t.model, {("backward", 1)}), **settings
    )
    assert_same_gradient(trainer.gradient, train(tmp_path, **settings).gradient)
    assert trainer.policy_count.forwards == 1 + 3 + 3  # failed; in halves: first pass, update


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_out_of_memory_with_one_completion_says_what_to_do(kind, tmp_path):
    every = {(kind, n) for n in range(1, 99)}
    model = make_model()
    usual = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="single completion in a micro-batch: set gradient_ch"):
        train(tmp_path, model=model, before=lambda t: plant_out_of_memory(t.model, every))
    assert model.config._attn_implementation == usual


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path):
    def plant(trainer):
        trainer.policy.loss = lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("broken"))

    with pytest.raises(RuntimeError, match="broken"):
        train(tmp_path, before=plant)


def test_fp16_gradients_are_scaled_where_they_are_made(tmp_path):
    """Advantages so small that without the loss scale inside the loss they vanish in fp16."""

    def tiny(completion_ids, **kwargs):
        return [1e-5 * reward for reward in first_reward(completion_ids)]

    def scaled(trainer):
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        trainer.accelerator.autocast = lambda: torch.autocast("cpu", dtype=torch.float16)

    fields = {"beta": 0.0, "reward": tiny}
    half = train(tmp_path, before=scaled, **fields)
    single = train(tmp_path, **fields)
    for name, gradient in single.gradient.items():
        found = half.gradient[name].float() / 2**14
        assert (found - gradient).norm() <= 0.05 * gradient.norm(), name
    assert half.logs[0]["loss/policy_avg"] == pytest.approx(single.logs[0]["loss/policy_avg"])


@pytest.mark.parametrize("loss", ["rloo", "reinforce_pp", "grpo", "dapo", "bnpo", "dr_grpo"])
def test_with_every_loss_rloo_s_advantages_are_k_over_k_minus_one_of_the_group_mean_s(
    loss, tmp_path
):
    """Where all completions are scorable; without a KL, gradients are linear in advantages."""
    rloo, dr_grpo = (
        train(tmp_path, loss=loss, advantage=name, beta=0.0).gradient
        for name in ("rloo", "dr_grpo")
    )
    assert_same_gradient(rloo, {name: 4 / 3 * g for name, g in dr_grpo.items()})


@pytest.mark.parametrize("loss", ["rloo", "grpo"])
def test_advantages_are_divided_by_the_std_of_what_the_group_was_rewarded_with(loss, tmp_path):
    """Rewards ten times as large, less a KL ten times as large where it is in them."""

    def tenfold(completion_ids, **kwargs):
        return [10 * reward for reward in first_reward(completion_ids)]

    fields = {"loss": loss, "advantage": "grpo", "before": move_away_from_the_reference}
    beta = 2.0 if loss == "rloo" else 0.2
    assert_same_gradient(
        train(tmp_path, reward=tenfold, **fields, beta=beta).gradient,
        train(tmp_path, **fields).gradient,
        rtol=2e-3,  # the 1e-4 that the std is increased by
    )


@pytest.mark.parametrize("loss", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_a_kl_in_the_loss_moves_completions_without_an_advantage(loss, tmp_path):
    """None is left out, and the gradient is that of the KL alone; in one forward."""
    trainer = train(
        tmp_path, loss=loss, reward=lambda completions, **kwargs: [1.0] * len(completions),
        before=move_away_from_the_reference,
    )  # fmt: skip
    assert trainer.logs[0]["update/frac_groups_not_run"] == 0
    assert trainer.policy_count.forwards == 1
    assert trainer.logs[0]["kl"] != 0
    assert max(g.norm() for g in trainer.gradient.values()) > 0


@pytest.mark.parametrize("loss", ["reinforce_pp", "grpo", "dapo", "bnpo", "dr_grpo"])
def test_evaluation_has_the_loss_of_a_first_step(loss, tmp_path):
    """Of the same completions, among them some that are cut off and masked."""

    def evaluated(trainer):
        move_away_from_the_reference(trainer)
        trainer.eval_dataset = PROMPTS.select(range(2))

    fields = {"mask_truncated_completions": True, "learning_rate": 0.0, "beta": 0.5}
    trainer = train(
        tmp_path, loss=loss, before=evaluated, per_device_eval_batch_size=8, **fields
    )  # fmt: skip
    trainer.rollouts.engine.calls = 0  # as in training
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.logs[0]["loss"], rel=1e-4)
    assert trainer.logs[0]["loss/policy_avg"] == pytest.approx(trainer.logs[0]["loss"], rel=1e-4)


def test_a_constant_added_to_the_rewards_changes_no_gradient(tmp_path):
    def shifted(completion_ids, **kwargs):
        return [reward + 3.0 for reward in first_reward(completion_ids)]

    assert_same_gradient(
        train(tmp_path, reward=shifted).gradient, train(tmp_path, reward=first_reward).gradient
    )


def test_a_step_of_masked_completions_alone_changes_nothing(tmp_path):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    trainer = train(
        tmp_path, engine=AllTruncated, model=model, mask_truncated_completions=True, max_steps=2
    )
    assert trainer.state.global_step == 2
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())


def test_dropout_is_off_by_default_in_adapters_too(tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(lora_dropout=0.3, target_modules=["q_proj"])
    assert not has_dropout(train(tmp_path, peft_config=lora).model)
    kept = train(tmp_path, peft_config=lora, disable_dropout=False)
    assert has_dropout(kept.model)
    assert kept.policy.num_forwards == 3  # reference, KL without dropout, the update


def test_dropout_in_the_attention_is_trained_with_padded_rows(tmp_path):
    model = make_model(attention_dropout=0.1)
    trainer = train(tmp_path, model=model, disable_dropout=False)
    assert trainer.update.planner.layout_name == "padded"
    assert trainer.policy.num_forwards == 2  # KL without dropout, the update


class HalfTheLoss(RLOOTrainer):
    """As subclasses of transformers' Trainer write it: the loss alone comes back."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 0.5 * super().compute_loss(model, inputs)


class PassedOn(RLOOTrainer):
    def compute_loss(self, *args, **kwargs):
        return 0.5 * super().compute_loss(*args, **kwargs)


class NoLossOfOurs(RLOOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return torch.zeros((), requires_grad=True)


@pytest.mark.parametrize("kind", [HalfTheLoss, PassedOn])
def test_a_subclass_may_change_the_loss(kind, tmp_path, monkeypatch):
    plain = train(tmp_path / "plain")
    monkeypatch.setitem(train.__globals__, "RLOOTrainer", kind)
    changed = train(tmp_path / "changed")
    assert_same_gradient(changed.gradient, {n: 0.5 * g for n, g in plain.gradient.items()})


def test_a_loss_that_is_not_made_of_ours_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(train.__globals__, "RLOOTrainer", NoLossOfOurs)
    with pytest.raises(TypeError, match="must call super"):
        train(tmp_path)


def test_outputs_come_with_the_loss_where_they_are_asked_for(tmp_path):
    found = []

    def watched(trainer):
        compute_loss = trainer.compute_loss

        def both(model, inputs):
            loss, result = compute_loss(model, inputs, return_outputs=True)
            found.append((loss, result))
            return loss

        trainer.compute_loss = both

    train(tmp_path, before=watched)
    ((loss, result),) = found
    assert loss is result.objective.loss or torch.equal(loss, result.objective.loss)
    assert result.aux_loss is None
