"""What TRL 1.16's trainer offers by name, beside ours: attributes, methods, texts of errors."""

from __future__ import annotations

import inspect
import logging
import re
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig as TRLConfig
from trl.trainer.rloo_trainer import RLOOTrainer as TRLTrainer

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.reports.metric_names import is_timing
from rloo_fast.trl_names import Name, NotHere, TRLNames
from tests.support.paths import ROOT
from tests.support.tiny import CHAT_TEMPLATE, make_model, make_tokenizer

PAGE = (ROOT / "docs" / "drop-in-for-trl.md").read_text()
NAMES = {name: value for name, value in vars(TRLNames).items() if isinstance(value, Name)}


def prompts(**columns: Any) -> Dataset:
    return Dataset.from_dict({"prompt": [f"w{i} w{i + 3}" for i in range(16)], **columns})


def length(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def first_id(completion_ids, **_):
    return [float(ids[0] % 5) for ids in completion_ids]


async def slow(completion_ids, **_):
    return length(completion_ids)


@pytest.fixture
def make(tmp_path):
    """A trainer of a class on a tiny model, with one setting after another."""

    def trainer(cls=RLOOTrainer, rewards=(length, first_id), callbacks=(), data=None, **settings):
        theirs = issubclass(cls, TRLTrainer)
        plain = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "max_steps": 2,
            "max_completion_length": 5, "report_to": "none", "save_strategy": "no", "bf16": False,
            "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2,
            "per_device_eval_batch_size": 4, "num_generations": 4,
        } | ({} if theirs else {"layout": "padded"})  # fmt: skip
        model: Any = make_model()
        if theirs:  # whose reference is loaded by the model's name
            model.save_pretrained(tmp_path / "model")
            model = str(tmp_path / "model")
        tokenizer = make_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        args: Any = (TRLConfig if theirs else RLOOConfig)(**{**plain, **settings})
        made = cls(
            model, list(rewards), args, prompts() if data is None else data, prompts(),
            processing_class=tokenizer, callbacks=list(callbacks),
        )  # fmt: skip
        made.remove_callback(PrinterCallback)
        return made

    return trainer


# --- attributes


def public(trainer: Any) -> set[str]:
    return {name for name in vars(trainer) if not name.startswith("_")}


FOR_TOOLS = ("tools", "rollout_func", "environment_factory")  # of TRL's GRPOTrainer alone


def test_constructor_arguments_are_trls_in_order():
    ours = inspect.signature(RLOOTrainer).parameters
    theirs = inspect.signature(GRPOTrainer).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
    assert list(inspect.signature(TRLTrainer).parameters) == list(ours)[: -len(FOR_TOOLS)]
    assert tuple(ours)[-len(FOR_TOOLS) :] == FOR_TOOLS


@pytest.fixture
def theirs(make):
    trainer = make(TRLTrainer, rewards=(length, slow), max_steps=1)
    made = public(trainer)
    trainer.train()
    return trainer, made | public(trainer)


def test_an_attribute_of_trls_trainer_is_here_with_its_value_or_says_what_to_use(make, theirs):
    trainer, names = theirs
    ours = make(rewards=(length, slow), max_steps=1)
    ours.train()
    assert len(names) > 70
    absent = {name for name in names if isinstance(NAMES.get(name), NotHere)}
    assert absent == {
        "generation_config", "generation_kwargs", "async_loop", "async_loop_thread",
        "async_loop_ready_event",
    }  # fmt: skip
    for name in absent:
        with pytest.raises(AttributeError, match=f"has no {name}, unlike TRL's trainer: "):
            getattr(ours, name)
    objects = {"ref_model"}  # others of the same type
    for name in names - absent:
        assert hasattr(ours, name), name
    for name in names & NAMES.keys() - absent - objects:
        mine, other = getattr(ours, name), getattr(trainer, name)
        same = mine.equal(other) if isinstance(other, torch.Tensor) else mine == other
        assert same, (name, mine, other)
    assert isinstance(ours.ref_model, type(trainer.ref_model))


def test_the_page_has_every_name_and_no_other(theirs):
    _, names = theirs
    table = PAGE.split("## Attributes of TRL's trainer")[1].split("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(NAMES)
    of_its_loop = {"current_gradient_accumulation_steps"}
    trls_own = names - public(transformers.Trainer(make_model())) - of_its_loop
    assert trls_own - set(listed) == set()


@pytest.mark.parametrize(
    "name", [n for n, v in NAMES.items() if isinstance(v.set, str) and not isinstance(v, NotHere)]
)
def test_what_cannot_act_cannot_be_set(make, name):
    trainer = make()
    with pytest.raises(AttributeError, match=f"{name} cannot be set on the trainer: "):
        setattr(trainer, name, getattr(trainer, name))


@pytest.mark.parametrize("name", ["reward_funcs", "reward_func_names", "eos_token_ids"])
def test_nor_can_it_be_changed_in_place(make, name):
    found = getattr(make(), name)
    with pytest.raises(TypeError, match="is a copy: changing it has no effect"):
        found[0] = None
    with pytest.raises(TypeError, match="is a copy: changing it has no effect"):
        found.append(None)


def test_what_is_here_can_be_read_and_set_to_its_own_value(make):
    trainer = make()
    here = {name: value for name, value in NAMES.items() if not isinstance(value, NotHere)}
    for name, value in here.items():
        found = getattr(trainer, name)
        if not isinstance(value.set, str):
            setattr(trainer, name, found)
            assert getattr(trainer, name) is found or getattr(trainer, name) == found, name


def test_unique_prompts_are_those_of_the_next_table(make):
    trainer = make()
    trainer.log_unique_prompts = True
    assert trainer.recorder.samples.unique_prompts


def test_chat_template_kwargs_are_those_of_the_next_prompts(make):
    trainer = make(data=prompts())
    trainer.processing_class.chat_template = "{% if short %}w1{% else %}w1 w2 w3{% endif %}"
    row = {"prompt": [{"role": "user", "content": "w4"}]}
    (before,) = trainer.collector.tokenize([row])
    trainer.chat_template_kwargs = {"short": True}
    (after,) = trainer.collector.tokenize([row])
    assert (len(before.ids), len(after.ids)) == (3, 1)
    assert trainer.chat_template_kwargs == {"short": True}


class SetAtTheStart(TrainerCallback):
    """What a user's callback does that closes over its trainer."""

    def __init__(self, **values: Any):
        self.values, self.trainer = values, None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        for name, value in self.values.items():
            setattr(self.trainer, name, value)


def logs(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [
        {name: value for name, value in row.items() if not is_timing(name)}
        for row in trainer.state.log_history
    ]


ACTS = {  # settings of the run, what a callback sets, fields that say the same from the start
    "beta": ({}, {"beta": 0.5}, {"beta": 0.5}),
    "reward_weights": ({}, {"reward_weights": [1.0, -2.0]}, {"reward_weights": [1.0, -2.0]}),
    "temperature": ({}, {"temperature": 0.5}, {"temperature": 0.5}),
    "epsilon": (
        {"num_iterations": 2},
        {"epsilon_low": 0.01, "epsilon_high": 0.02},
        {"epsilon": 0.01, "epsilon_high": 0.02},
    ),
    "normalize_advantages": ({}, *[{"normalize_advantages": True}] * 2),
    "mask_truncated_completions": ({}, *[{"mask_truncated_completions": True}] * 2),
    "reward_clip_range": ({}, *[{"reward_clip_range": (-1, 2)}] * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTS)
def test_what_a_callback_sets_acts_as_if_it_had_been_configured(make, name):
    settings, sets, fields = ACTS[name]
    callback = SetAtTheStart(**sets)
    callback.trainer = make(callbacks=[callback], **settings)
    found, plain = logs(callback.trainer), logs(make(**settings))
    assert found == logs(make(**{**settings, **fields}))
    assert found != plain
    assert {n: getattr(callback.trainer, n) for n in sets if n != "reward_weights"} == {
        n: list(v) if isinstance(v, tuple) else v for n, v in sets.items() if n != "reward_weights"
    }


class SetAfterTheFirstStep(SetAtTheStart):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            super().on_train_begin()


def test_reward_weights_set_in_a_run_weigh_from_the_next_step(make):
    callback = SetAfterTheFirstStep(reward_weights=torch.tensor([0.0, 3.0]))
    callback.trainer = make(callbacks=[callback])
    found = logs(callback.trainer)
    for row, (one, other) in zip(found, [(1, 1), (0, 3)], strict=False):
        means = [row[f"rewards/{n}/mean"] for n in ("length", "first_id")]
        assert row["reward"] == pytest.approx(one * means[0] + other * means[1])


def test_a_temperature_set_in_a_run_is_that_of_sampler_and_trainer(make):
    callback = SetAfterTheFirstStep(temperature=0.3)
    callback.trainer = make(callbacks=[callback])
    found = logs(callback.trainer)[:2]
    assert all(row["sampling/logp_diff_max"] < 1e-4 for row in found)
    assert found[1]["entropy"] < found[0]["entropy"] - 0.1


def test_beta_may_be_switched_off_and_on_again(make):
    trainer = make(beta=0.5)
    trainer.beta = 0.0
    assert all(row["objective/non_score_reward"] == 0 for row in logs(trainer)[:2])
    trainer.beta = 0.5
    assert (trainer.recorder.beta, trainer.update.preparer.settings.beta) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("settings", "name", "value", "sentence"),
    [
        ({"beta": 0.0}, "beta", 0.1, "needs a reference model, and RLOOConfig.beta=0. kept none"),
        ({}, "beta", -1.0, "beta must be >= 0"),
        ({}, "epsilon_low", -1.0, "epsilon must be >= 0"),
        ({}, "temperature", 0.0, "temperature must be > 0"),
        ({}, "reward_weights", [1.0], r"reward weights \(1\) must match .* functions \(2\)"),
        ({}, "reward_clip_range", (2, 1), "min < max"),
        ({}, "num_generations_eval", 3, r"global eval batch size \(4 \* 1\) must be divisible"),
        ({}, "router_aux_loss_coef", 0.1, "was 0 when the trainer was made"),
    ],
)
def test_a_value_that_cannot_act_is_refused_when_it_is_set(make, settings, name, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        setattr(make(**settings), name, value)


def test_temperature_waits_for_completions_that_are_still_to_be_trained_on(make):
    callback = SetAfterTheFirstStep(temperature=0.3)
    callback.trainer = make(callbacks=[callback], num_iterations=2)
    with pytest.raises(ValueError, match=r"sampled at temperature 1.0 are still to be trained on"):
        callback.trainer.train()


def test_num_generations_eval_set_on_the_trainer_is_that_of_the_next_evaluation(make):
    calls = []

    def reward(prompts, **_):
        calls.append(len(prompts))
        return [0.0] * len(prompts)

    trainer = make(rewards=(reward,))
    trainer.num_generations_eval = 2
    trainer.evaluate()
    assert sum(calls) == 16 * 2


def test_completions_are_logged_from_the_moment_on_that_it_is_set(make, capsys):
    trainer = make(max_steps=1)
    trainer.log_completions, trainer.num_completions_to_print = True, 1
    trainer.train()
    assert "length" in capsys.readouterr().out


def test_a_metric_appended_to_trls_private_lists_is_logged(make):
    class Mine(RLOOTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self._metrics["train"]["mine"].append(2.0)
            return super().training_step(*args, **kwargs)

    assert logs(make(Mine))[0]["mine"] == 2.0


# --- methods

CALLED = {  # of TRL's trainer, those that a subclass of ours may override as well
    "training_step", "compute_loss", "prediction_step", "log", "create_model_card",
    "get_train_dataloader", "get_eval_dataloader", "_save_checkpoint",
    "_set_signature_columns_if_needed",
}  # fmt: skip


def methods() -> set[str]:
    return {
        name
        for cls in (TRLTrainer, *TRLTrainer.__mro__[1:2])
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and not name.startswith("__")
    }


def test_every_method_of_trls_trainer_is_called_or_refused():
    assert methods() == CALLED | {n for n in methods() if isinstance(NAMES.get(n), NotHere)}


@pytest.mark.parametrize("name", sorted(methods() - CALLED))
def test_a_class_with_a_method_that_would_never_be_called_is_refused(name):
    with pytest.raises(TypeError, match=f"Mine overrides {name}, which .* never reads"):
        type("Mine", (RLOOTrainer,), {name: lambda self, *args: None})


def test_so_is_a_mixin_that_has_one():
    class Mixin:
        def _calculate_rewards(self, *args: Any) -> None: ...

    with pytest.raises(TypeError, match="write a reward function"):
        type("Mine", (Mixin, RLOOTrainer), {})


@pytest.mark.parametrize("name", ["beta", "reward_weights"])
def test_and_a_class_with_an_attribute_that_nobody_reads(name):
    with pytest.raises(TypeError, match=f"overrides {name}.* set it on the trainer"):
        type("Mine", (RLOOTrainer,), {name: property(lambda self: 1.0)})


@pytest.mark.parametrize("name", sorted(CALLED - {"create_model_card", "_save_checkpoint"}))
def test_an_overridden_method_of_the_same_name_is_called(make, name):
    calls = []

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return getattr(RLOOTrainer, name)(self, *args, **kwargs)

    trainer = make(type("Mine", (RLOOTrainer,), {name: method}), max_steps=1)
    trainer.train()
    trainer.evaluate()
    if name != "_set_signature_columns_if_needed":  # transformers', where columns are removed
        assert calls


def test_tags_of_a_class_are_on_its_model_card(make, tmp_path):
    class Mine(RLOOTrainer):
        _tag_names = ("of-mine",)

    make(Mine).create_model_card(tags="more")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- of-mine\n" in card
    assert "- more\n" in card


# --- texts that users search for


def lora() -> Any:
    return LoraConfig(target_modules=["q_proj"])


def stream() -> Any:
    return IterableDataset.from_generator(lambda: iter([{"prompt": "w0"}]))


def config(**settings: Any) -> RLOOConfig:
    plain = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none"}
    plain |= {"max_completion_length": 4, "save_strategy": "no", "disable_tqdm": True}
    return RLOOConfig(**{**plain, "per_device_train_batch_size": 4, "max_steps": 1, **settings})


def trainer_of(tmp_path: Any, **arguments: Any) -> Any:
    settings = arguments.pop("settings", {})
    plain = {
        "model": make_model(),
        "reward_funcs": length,
        "args": config(output_dir=str(tmp_path), **settings),
        "train_dataset": prompts(),
        "processing_class": make_tokenizer(),
    }
    return RLOOTrainer(**{**plain, **arguments})


TEXTS: dict[str, Any] = {  # a phrase of TRL's: what brings it up here
    "'generation_batch_size' and 'steps_per_generation' can not be both configured at the same": (
        lambda _: config(steps_per_generation=2, generation_batch_size=4)
    ),
    "must be divisible by the global batch size": lambda _: config(generation_batch_size=6),
    "must be divisible by num_generations": lambda _: config(num_generations=3),
    "must be divisible by the number of generations used for evaluation": (
        lambda _: config(eval_strategy="steps", per_device_eval_batch_size=3)
    ),
    "RLOO requires at least 2 generations per prompt to calculate the advantages": (
        lambda _: config(num_generations=1)
    ),
    "auto_find_batch_size is not supported by RLOO": lambda _: config(auto_find_batch_size=True),
    "RLOOTrainer does not support sequence-dim parallelism": (
        lambda _: config(parallelism_config=parallelism())
    ),
    "You passed `sync_ref_model=True` while `beta=0.0`": (
        lambda _: config(beta=0.0, sync_ref_model=True)
    ),
    "`train_dataset` is required": lambda path: trainer_of(path, train_dataset=None),
    "`train_dataset` must be a `Dataset` or `IterableDataset`": (
        lambda path: trainer_of(path, train_dataset=[])
    ),
    "Iterable datasets require `dispatch_batches=False`": lambda path: trainer_of(
        path, train_dataset=stream(), settings={"accelerator_config": {"dispatch_batches": True}}
    ),
    "Number of reward weights (2) must match number of reward functions (1)": (
        lambda path: trainer_of(path, settings={"reward_weights": [1.0, 2.0]})
    ),
    "The number of reward processing classes (2) must match the number of reward functions (1)": (
        lambda path: trainer_of(path, reward_processing_classes=[None, None])
    ),
    "`peft_config` must be a `peft.PeftConfig` instance": (
        lambda path: trainer_of(path, peft_config={"r": 8})
    ),
    "You passed a `PeftModel` instance together with a `peft_config`": lambda path: trainer_of(
        path, model=get_peft_model(make_model(), lora()), peft_config=lora()
    ),
    "You passed `sync_ref_model=True` while using a PEFT model": (
        lambda path: trainer_of(path, peft_config=lora(), settings={"sync_ref_model": True})
    ),
    "The `processing_class` must be": lambda path: trainer_of(path, processing_class=1),
    "is not a Mixture-of-Experts model that returns its router logits": (
        lambda path: trainer_of(path, settings={"router_aux_loss_coef": 0.1})
    ),
    "You set `quantization_config` both as a trainer argument and in `args.model_init_kwargs`": (
        lambda path: trainer_of(
            path,
            model=saved(path),
            quantization_config={"load_in_4bit": True},
            settings={"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}},
        )
    ),
    "evaluation requires an eval_dataset": lambda path: trainer_of(path).evaluate(),
    "rewards, but 4 were expected": (
        lambda path: trainer_of(path, reward_funcs=lambda **_: [1.0]).train()
    ),
}


def parallelism() -> Any:
    from accelerate import ParallelismConfig

    return ParallelismConfig(cp_size=2)


def saved(path: Any) -> str:
    make_model().save_pretrained(path / "model")
    return str(path / "model")


def source_of_trl() -> str:
    """Texts of TRL's trainer and configuration, with their parts joined and values left out."""
    modules = [inspect.getmodule(cls) for cls in (TRLTrainer, TRLConfig)]
    text = "".join(inspect.getsource(module) for module in modules if module)
    joined = re.sub(r"[\"']\s*\n\s*f?[\"']", "", text)
    return re.sub(r"\{[^{}]*\}", "{}", joined)


@pytest.mark.parametrize("phrase", TEXTS)
def test_an_error_has_the_words_of_trls(phrase, tmp_path):
    with pytest.raises((ValueError, TypeError)) as raised:
        TEXTS[phrase](tmp_path)
    assert phrase in str(raised.value)
    theirs = re.sub(r"\(\d\)", "({})", phrase).replace("RLOOTrainer does", "does")
    theirs = theirs.replace("but 4 were", "but {} were").replace("`train_dataset` must", "must")
    assert theirs in source_of_trl().replace("f'", "'") or theirs.startswith("rewards, but")


# --- warnings after which TRL goes on, and so do we


def test_workers_for_a_stream_are_overridden_with_a_warning(tmp_path, caplog):
    rows = IterableDataset.from_generator(lambda: iter([{"prompt": f"w{i}"} for i in range(8)]))
    trainer = trainer_of(tmp_path, train_dataset=rows, settings={"dataloader_num_workers": 2})
    assert "Iterable datasets require `dataloader_num_workers=0`" in caplog.text
    assert "overriding the provided value (2)" in caplog.text
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    "settings",
    [{"dispatch_batches": True}, {"even_batches": False}, {"use_seedable_sampler": False}],
    ids=str,
)
def test_how_batches_would_be_fetched_is_said_to_have_no_effect(tmp_path, caplog, settings):
    trainer_of(tmp_path, settings={"accelerator_config": settings}).train()
    assert "has no effect here, as batches are not made by accelerate." in caplog.text


def test_settings_of_loading_are_ignored_for_a_loaded_model(tmp_path, caplog):
    trainer_of(tmp_path, settings={"model_init_kwargs": {"dtype": "float32"}})
    assert "your model is already instantiated" in caplog.text


def test_the_warning_that_nothing_was_scored_has_the_keywords_of_the_row(make, caplog):
    with caplog.at_level(logging.WARNING):
        make(
            rewards=(lambda completions, **_: [None] * len(completions),),
            data=prompts(answer=[f"answer {i}" for i in range(16)]),
            max_steps=1,
        ).train()
    text = caplog.text
    assert (
        "All reward functions returned None for the following kwargs:\n{'answer': 'answer" in text
    )
    assert "'prompt': 'w" in text
    assert "'completion': '" in text
    assert "Please ensure that at least one reward function returns a valid reward." in text
