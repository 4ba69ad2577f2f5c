"""One short run per field of RLOOConfig that shows what its value changes (see test_config.py)."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PrinterCallback,
    Qwen2ForSequenceClassification,
    TrainerCallback,
)

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.config import refused as config_refused
from rloo_fast.models.dropout import has_dropout
from rloo_fast.rewards import RewardTimeout
from tests.support.tiny import make_model, make_tokenizer


def rows(num: int = 16, **columns: Any) -> Dataset:
    prompts = [" ".join(f"w{(i * 7 + j) % 26}" for j in range(1 + i % 3)) for i in range(num)]
    return Dataset.from_dict({"prompt": prompts, **{k: [v] * num for k, v in columns.items()}})


class Runs:
    """Makes trainers of tiny models, and trains them."""

    def __init__(self, path: Path):
        self.path = path

    def trainer(
        self, *, model=None, rewards=None, train=None, evaluation=None, tokenizer=None,
        callbacks=None, **settings,
    ) -> Any:  # fmt: skip
        trainer: Any = RLOOTrainer(
            model=make_model() if model is None else model,
            reward_funcs=varied_reward if rewards is None else rewards,
            args=self.config(**settings),
            train_dataset=rows() if train is None else train,
            eval_dataset=evaluation,
            processing_class=tokenizer or make_tokenizer(),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.sampled = record_generate(trainer.model)
        return trainer

    def config(self, **settings: Any) -> RLOOConfig:
        standard = {
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_completion_length": 4,
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        return RLOOConfig(output_dir=str(self.path / "out"), **{**standard, **settings})

    def __call__(self, **settings: Any) -> Any:
        trainer = self.trainer(**settings)
        trainer.train()
        trainer.logs = [row for row in trainer.state.log_history if "loss" in row]
        return trainer


def varied_reward(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]


def record_generate(model: Any) -> list[SimpleNamespace]:
    """The keywords of every `generate` call from now on that samples, and the ids it returned."""
    calls, original = [], model.generate

    def recorded(**keywords):
        out = original(**keywords)
        if keywords["generation_config"].return_dict_in_generate:
            return out  # prompts are run ahead, once for all their samples
        calls.append(SimpleNamespace(**keywords, ids=out[:, keywords["input_ids"].shape[1] :]))
        return out

    model.generate = recorded
    return calls


def keeping(seen: list[dict[str, Any]]):
    """A reward function that keeps what it is called with."""

    def reward(completion_ids, **keywords):
        seen.append({"completion_ids": completion_ids, **keywords})
        return [float(i) for i in range(len(completion_ids))]

    return reward


def constant(value: float):
    def reward(completions, **kwargs):
        return [value] * len(completions)

    return reward


@pytest.fixture
def run(tmp_path):
    return Runs(tmp_path)


def groups_are_equal(trainer: Any) -> bool:
    ids = trainer.sampled[0].ids
    return bool((ids[0::2] == ids[1::2]).all())


def test_without_restrictions_the_completions_of_a_prompt_differ(run):
    assert not groups_are_equal(run())


# Model


def test_effect_of_model_init_kwargs(run, model_dir):
    kwargs = {"dtype": "bfloat16", "attn_implementation": "eager"}
    model = run.trainer(model=str(model_dir), model_init_kwargs=kwargs).model
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")


def test_torch_dtype_is_taken_for_dtype(run, model_dir):
    kwargs = {"torch_dtype": "bfloat16"}
    model = run.trainer(model=str(model_dir), model_init_kwargs=kwargs).model
    assert model.dtype == torch.bfloat16


def test_a_model_given_by_name_is_loaded_in_float32(run, tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert run.trainer(model=str(tmp_path / "half")).model.dtype == torch.float32


def test_effect_of_trust_remote_code(run, model_dir, monkeypatch):
    """It is passed on for the policy, for a reward model, and for their tokenizers."""
    config = make_model().config
    config.num_labels = 1
    reward = str(model_dir.parent / "reward")
    Qwen2ForSequenceClassification(config).save_pretrained(reward)
    passed = []

    def watch(cls, load):
        def from_pretrained(name, **kwargs):
            passed.append((Path(name).name, kwargs["trust_remote_code"]))
            return load(name, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)

    for cls in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        watch(cls, cls.from_pretrained)
    watch(AutoTokenizer, lambda name, **kwargs: make_tokenizer())
    args = run.config(trust_remote_code=True)
    RLOOTrainer(model=str(model_dir), reward_funcs=reward, args=args, train_dataset=rows())
    assert sorted(passed) == [("model", True)] * 2 + [("reward", True)] * 2


def make_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
        max_position_embeddings=64, router_aux_loss_coef=0.02, eos_token_id=1,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def test_effect_of_router_aux_loss_coef(run):
    without = run(model=make_mixtral(), router_aux_loss_coef=0.0).logs[0]["loss"]
    for coef, weight in ((3.0, 3.0), (None, 0.02)):
        log = run(model=make_mixtral(), router_aux_loss_coef=coef).logs[0]
        assert log["aux_loss"] > 1
        assert log["loss"] - without == pytest.approx(weight * log["aux_loss"], rel=1e-4)


def test_router_aux_loss_coef_of_a_model_without_a_router_is_refused(run):
    with pytest.raises(
        ValueError, match=r"Qwen2ForCausalLM is not a Mixture-of-Experts model .* leave it out"
    ):
        run.trainer(router_aux_loss_coef=0.1)


def test_effect_of_disable_dropout(run):
    trainer = run.trainer(model=make_model(attention_dropout=0.5), disable_dropout=False)
    assert has_dropout(trainer.model)
    assert has_dropout(trainer.reference.model)
    trainer = run.trainer(model=make_model(attention_dropout=0.5))
    assert not has_dropout(trainer.model)
    assert not has_dropout(trainer.reference.model)


# Data


def test_effect_of_remove_unused_columns(run):
    for remove in (False, True):
        seen: list[dict] = []
        run(train=rows(answer="w5"), rewards=keeping(seen), remove_unused_columns=remove)
        assert ("answer" in seen[0]) != remove


def test_effect_of_shuffle_dataset(run):
    first = []
    for shuffle in (False, True):
        seen: list[dict] = []
        run(rewards=keeping(seen), shuffle_dataset=shuffle)
        first.append(seen[0]["prompts"][::2])
    assert first[0] == rows()["prompt"][:2]
    assert first[1] != first[0]


def test_effect_of_chat_template_kwargs(run):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ 'w3' if short else 'w4 w4' }}"
    chat = Dataset.from_dict({"prompt": [[{"role": "user", "content": "w1"}]] * 4})
    trainer = run(train=chat, tokenizer=tokenizer, chat_template_kwargs={"short": True})
    assert tokenizer.batch_decode(trainer.sampled[0].input_ids) == ["w3"] * 4


def test_effect_of_pad_to_multiple_of(run):
    widths = {}
    for multiple in ("auto", 16):
        widths[multiple] = {"rollout": set(), "update": set()}
        trainer = run.trainer(pad_to_multiple_of=multiple)

        def keep(module, args, kwargs, into=widths[multiple], trainer=trainer):
            if trainer.model.training:
                into["update"].add(kwargs["input_ids"].shape[1])  # one line

        trainer.model.model.register_forward_pre_hook(keep, with_kwargs=True)
        trainer.train()
        widths[multiple]["rollout"] = {call.input_ids.shape[1] for call in trainer.sampled}
    assert widths[16] == {"rollout": {16}, "update": {16}}
    assert max(widths["auto"]["rollout"]) <= 3
    assert max(widths["auto"]["update"]) < 16


def test_effect_of_dataloader_num_workers(run):
    prompts = []
    for num_workers in (0, 2):
        trainer = run(dataloader_num_workers=num_workers, log_completions=True)
        assert trainer.get_train_dataloader().num_workers == num_workers
        prompts.append(list(trainer.recorder.samples.table("train", 1)["prompt"]))
    assert prompts[0] == prompts[1] != []


# Batches


def test_effect_of_per_device_train_batch_size(run):
    trainer = run(per_device_train_batch_size=6)
    assert [len(call.input_ids) for call in trainer.sampled] == [6]


def test_effect_of_per_device_eval_batch_size(run):
    trainer = run.trainer(evaluation=rows(5), per_device_eval_batch_size=6)
    trainer.evaluate()
    assert [len(call.input_ids) for call in trainer.sampled] == [6, 4]


def test_effect_of_gradient_accumulation_steps(run):
    trainer = run(gradient_accumulation_steps=3)
    assert [len(call.input_ids) for call in trainer.sampled] == [12]
    assert trainer.logs[0]["episode"] == 12


def test_effect_of_num_generations(run):
    seen: list[dict] = []
    run(rewards=keeping(seen), num_generations=4, per_device_train_batch_size=8)
    prompts = seen[0]["prompts"]
    assert prompts == [prompts[0]] * 4 + [prompts[4]] * 4
    assert prompts[0] != prompts[4]


def test_effect_of_num_generations_eval(run):
    seen: list[dict] = []
    trainer = run.trainer(rewards=keeping(seen), evaluation=rows(3), num_generations_eval=1)
    trainer.evaluate()
    assert [call["prompts"] for call in seen] == [rows(3)["prompt"]]


def test_effect_of_generation_batch_size(run):
    trainer = run(generation_batch_size=8, max_steps=3)
    assert [len(call.input_ids) for call in trainer.sampled] == [8, 8]


def test_effect_of_steps_per_generation(run):
    trainer = run(steps_per_generation=2, max_steps=3)
    assert [len(call.input_ids) for call in trainer.sampled] == [8, 8]


def test_effect_of_num_iterations(run):
    trainer = run(num_iterations=3, max_steps=4)
    assert len(trainer.sampled) == 2


# Sampling


def test_effect_of_max_completion_length(run):
    assert run(max_completion_length=7).sampled[0].ids.shape[1] == 7


def test_effect_of_temperature(run):
    cool, hot = run(temperature=0.25), run(temperature=4.0)
    distinct = [len(trainer.sampled[0].ids.unique()) for trainer in (cool, hot)]
    assert distinct[0] < distinct[1]
    assert cool.logs[0]["entropy"] < hot.logs[0]["entropy"] / 2


def test_effect_of_top_k(run):
    assert groups_are_equal(run(top_k=1))


def test_effect_of_top_p(run):
    assert groups_are_equal(run(top_p=1e-6))


def test_effect_of_min_p(run):
    assert groups_are_equal(run(min_p=1.0))


def test_effect_of_repetition_penalty(run):
    trainer = run(repetition_penalty=1e9, top_k=1, max_completion_length=12)
    assert trainer.sampled[0].generation_config.repetition_penalty == 1e9
    unpenalised = run(top_k=1, max_completion_length=12)
    count = [
        sum(len(set(ids.tolist())) for ids in t.sampled[0].ids) for t in (trainer, unpenalised)
    ]
    assert count[0] > count[1]


def test_effect_of_generation_kwargs(run):
    allowed = [7, 8]
    kwargs = {"suppress_tokens": [i for i in range(32) if i not in allowed], "top_k": 1}
    trainer = run(generation_kwargs=kwargs, top_k=5)
    assert set(trainer.sampled[0].ids.flatten().tolist()) <= {*allowed}
    assert groups_are_equal(trainer)


def test_effect_of_cache_implementation(run):
    trainer = run(cache_implementation="static")
    assert trainer.sampled[0].generation_config.cache_implementation == "static"


def test_generation_runs_one_token_at_a_time_after_the_prompt(run):
    trainer, widths = run.trainer(layout="padded"), []  # no trial run

    def keep(module, args, kwargs):
        if not trainer.model.training:
            widths.append(kwargs["input_ids"].shape[1])

    trainer.rollouts.engine.may_pad = True  # no trial run here, either
    trainer.model.model.register_forward_pre_hook(keep, with_kwargs=True)
    trainer.train()
    assert widths[1:] == [1] * (len(widths) - 1)
    assert len(widths) > 1


def test_the_models_own_sampling_defaults_do_not_replace_the_configured_ones(run):
    model: Any = make_model()
    model.generation_config.top_k = 1
    assert not groups_are_equal(run(model=model))


def test_effect_of_seed(run):
    ids = [run(seed=seed).sampled[0].ids.tolist() for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


# Algorithm


def test_effect_of_beta(run):
    trainer = run(beta=0.0, max_steps=2, learning_rate=0.01)
    assert trainer.reference is None
    assert "kl" not in trainer.logs[1]
    trainer = run(beta=0.5, max_steps=2, learning_rate=0.01)
    log = trainer.logs[1]
    assert log["objective/non_score_reward"] == pytest.approx(-0.5 * log["objective/kl"])
    assert abs(log["objective/kl"]) > 1e-4


def test_effect_of_epsilon(run):
    settings = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.05, "beta": 0.0}
    assert run(epsilon=1e-6, **settings).logs[1]["clip_ratio/region_mean"] > 0
    assert run(epsilon=1e9, **settings).logs[1]["clip_ratio/region_mean"] == 0


def test_effect_of_epsilon_high(run):
    settings = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.05, "beta": 0.0}
    log = run(epsilon=1e-6, epsilon_high=1e9, **settings).logs[1]
    assert log["clip_ratio/high_mean"] == 0 < log["clip_ratio/low_mean"]


def test_effect_of_reward_weights(run):
    log = run(rewards=[constant(1.0), constant(10.0)], reward_weights=[0.5, -1.0]).logs[0]
    assert log["reward"] == -9.5


def test_effect_of_reward_kwargs(run):
    settings: dict[str, Any] = {"eos_token_id": 99, "pad_token_id": 0}  # 4 tokens each
    log = run(
        rewards="length", reward_kwargs={"length": {"target": 2, "limit": 10}},
        model=make_model(**settings),
    ).logs[0]  # fmt: skip
    assert log["rewards/length/mean"] == -0.25


def test_effect_of_execute_model_code(run, tmp_path):
    (tmp_path / "runs.py").write_text(
        "def score(completions, **kwargs):\n    return [1.0] * len(completions)\n"
        "score.executes_model_code = True\n"
    )
    name = f"{tmp_path / 'runs.py'}:score"
    with pytest.raises(ValueError, match="execute_model_code=True"):
        run.trainer(rewards=name)
    assert run.trainer(rewards=name, execute_model_code=True).rewards.names == ["score"]


def test_effect_of_reward_clip_range(run):
    log = run(rewards=constant(5.0), reward_clip_range=(-1.0, 2.0)).logs[0]
    assert (log["reward"], log["objective/scores"]) == (5.0, 2.0)


def test_effect_of_normalize_advantages(run):
    trainer = run(normalize_advantages=True, log_completions=True)
    advantages = torch.tensor(list(trainer.recorder.samples.table("train", 1)["advantage"]))
    assert advantages.mean() == pytest.approx(0, abs=1e-6)
    assert advantages.std() == pytest.approx(1, abs=1e-3)


def test_effect_of_soft_punish_cache(run):
    without_eos = {"generation_kwargs": {"suppress_tokens": [1]}}  # the longest completion, each
    log = run(soft_punish_cache=2, **without_eos).logs[0]
    assert log["objective/scores"] == pytest.approx(log["reward"] - 1)


def test_effect_of_mask_truncated_completions(run):
    without_eos = {"generation_kwargs": {"suppress_tokens": [1]}}
    assert run(**without_eos).logs[0]["grad_norm"] > 0
    assert run(mask_truncated_completions=True, **without_eos).logs[0]["grad_norm"] == 0


class KeepWeights(TrainerCallback):
    def __init__(self):
        self.after: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append({n: p.detach().clone() for n, p in model.named_parameters()})


def reference_after(run, *, steps: int, every: int, alpha: float):
    """(policy weights before the run, those after each step, reference weights at the end)."""
    model, kept = make_model(), KeepWeights()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = run(
        model=model, callbacks=[kept], max_steps=steps, learning_rate=0.01, sync_ref_model=True,
        ref_model_sync_steps=every, ref_model_mixup_alpha=alpha,
    )  # fmt: skip
    return start, kept.after, dict(trainer.reference.model.named_parameters())


def test_effect_of_sync_ref_model(run):
    start = {n: p.detach().clone() for n, p in make_model().named_parameters()}
    fixed = run(max_steps=2, learning_rate=0.01, ref_model_sync_steps=1).reference.model
    assert all(torch.equal(p, start[n]) for n, p in fixed.named_parameters())
    _, after, reference = reference_after(run, steps=2, every=1, alpha=1.0)
    assert all(torch.equal(p, after[1][n]) for n, p in reference.items())


def test_effect_of_ref_model_mixup_alpha(run):
    start, after, reference = reference_after(run, steps=2, every=1, alpha=0.25)
    for name, parameter in reference.items():
        first = 0.25 * after[0][name] + 0.75 * start[name]
        torch.testing.assert_close(parameter.detach(), 0.25 * after[1][name] + 0.75 * first)


def test_effect_of_ref_model_sync_steps(run):
    start, after, reference = reference_after(run, steps=3, every=2, alpha=0.25)
    for name, parameter in reference.items():
        wanted = 0.25 * after[1][name] + 0.75 * start[name]
        torch.testing.assert_close(parameter.detach(), wanted)


def test_effect_of_reward_timeout_s(run):
    def slow(completions, **kwargs):
        time.sleep(1)
        return [0.0] * len(completions)

    with pytest.raises(RewardTimeout, match=r"'slow' still ran after 0\.05 s"):
        run(rewards=slow, reward_timeout_s=0.05)


# Logging


def test_effect_of_learning_rate(run):
    assert run(learning_rate=0.5).logs[0]["learning_rate"] == 0.5


def test_effect_of_logging_steps(run):
    assert [row["step"] for row in run(max_steps=4, logging_steps=2).logs] == [2, 4]


def test_effect_of_log_format(run, capsys):
    def printed(**settings):
        run(logging_steps=1, **settings)
        return [line for line in capsys.readouterr().out.splitlines() if "reward" in line]

    assert all(line.startswith("{'loss': ") for line in printed())
    lines = printed(log_format="line")
    assert lines
    assert all(line.startswith("step ") and len(line) < 200 for line in lines)


def printed_prompts(run, capsys, monkeypatch, **settings) -> int:
    """How many rows the completions tables of a step of 4 completions of one prompt have."""
    monkeypatch.setenv("COLUMNS", "200")
    run(train=Dataset.from_dict({"prompt": ["PROMPT"] * 4}), **settings)
    return capsys.readouterr().out.count("PROMPT")


def test_effect_of_log_completions(run, capsys, monkeypatch):
    assert printed_prompts(run, capsys, monkeypatch) == 0
    assert printed_prompts(run, capsys, monkeypatch, log_completions=True) == 4


def test_effect_of_num_completions_to_print(run, capsys, monkeypatch):
    settings = {"log_completions": True, "num_completions_to_print": 3}
    assert printed_prompts(run, capsys, monkeypatch, **settings) == 3


def test_effect_of_log_unique_prompts(run, capsys, monkeypatch):
    settings = {"log_completions": True, "log_unique_prompts": True}
    assert printed_prompts(run, capsys, monkeypatch, **settings) == 1


def test_effect_of_log_completions_csv(run, capsys, monkeypatch, tmp_path):
    run(log_completions=True)
    capsys.readouterr()
    assert not (tmp_path / "out/completions.csv").exists()
    settings = {"log_completions_csv": True, "num_completions_to_print": 3}
    assert printed_prompts(run, capsys, monkeypatch, **settings) == 0
    assert (tmp_path / "out/completions.csv").read_text().count("PROMPT") == 3


def test_effect_of_view_mib(run, tmp_path):
    run()
    assert not (tmp_path / "out/_view").exists()
    run(view_mib=1)
    assert [path.name for path in (tmp_path / "out/_view").glob("step-*")] == [
        "step-00000001.parquet"
    ]


# Precision, memory, kernels


def test_effect_of_bf16(run):
    dtypes = {}
    trainer = run.trainer(bf16=True)

    def keep(module, args, out):
        dtypes[trainer.model.training] = out.dtype

    trainer.model.model.layers[0].mlp.register_forward_hook(keep)
    trainer.train()
    assert dtypes == {False: torch.bfloat16, True: torch.bfloat16}
    assert trainer.model.dtype == torch.float32


def test_effect_of_gradient_checkpointing(run):
    assert run(gradient_checkpointing=True).model.is_gradient_checkpointing
    assert not run(gradient_checkpointing=False).model.is_gradient_checkpointing


renamed = pytest.mark.skipif(
    "activation_checkpointing" not in RLOOConfig.__dataclass_fields__,
    reason="this transformers release has the name gradient_checkpointing only",
)


@renamed
def test_effect_of_activation_checkpointing(run):
    assert run(activation_checkpointing=True).model.is_gradient_checkpointing
    off = {"activation_checkpointing": False, "gradient_checkpointing": True}  # the old name loses
    assert not run(**off).model.is_gradient_checkpointing


def checkpoint_arguments(trainer: Any) -> dict[str, Any]:
    return trainer.model.model.layers[0]._gradient_checkpointing_func.keywords


def test_effect_of_gradient_checkpointing_kwargs(run):
    kwargs = {"use_reentrant": True}
    trainer = run(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert checkpoint_arguments(trainer) == kwargs


@renamed
def test_effect_of_activation_checkpointing_kwargs(run):
    kwargs = {"use_reentrant": True}
    trainer = run(activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
    assert checkpoint_arguments(trainer) == kwargs


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for liger-kernel that keeps the models and keywords it is called with."""
    calls = []
    fake: Any = ModuleType("liger_kernel.transformers")
    fake._apply_liger_kernel_to_instance = lambda model, **kwargs: calls.append((model, kwargs))
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)
    for module in ("transformers.integrations.liger", "rloo_fast.config.refused"):
        monkeypatch.setattr(f"{module}.is_liger_kernel_available", lambda: True)
    return calls


HEADS_OFF = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def test_effect_of_use_liger_kernel(run, liger):
    trainer = run(use_liger_kernel=True)
    assert [model for model, _ in liger] == [trainer.reference.model, trainer.model]
    assert [kwargs for _, kwargs in liger] == [HEADS_OFF] * 2


def test_effect_of_liger_kernel_config(run, liger):
    run(use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert liger[0][1] == {"rope": False, **HEADS_OFF}


@pytest.mark.parametrize("head", HEADS_OFF)
def test_ligers_heads_are_refused(head, liger, tmp_path):
    with pytest.raises(ValueError, match=f"asks for {head}, which RLOO's loss does not use"):
        RLOOConfig(str(tmp_path), use_liger_kernel=True, liger_kernel_config={head: True})


def test_liger_that_is_not_installed_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(config_refused, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        RLOOConfig(str(tmp_path), use_liger_kernel=True)
