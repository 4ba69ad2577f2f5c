"""What a caller can get wrong: an error before training that says what came and what to write.

What can be told without the model is told before it is loaded. Bad values of RLOOConfig are in
test_rloo_config.py, of the command line and YAML files in tests/cli.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PrinterCallback, Qwen2Model

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.rewards import RewardError
from tests.support.tiny import make_model, make_tokenizer

CHAT = [{"role": "user", "content": "w1"}]


def zeros(completions, **kwargs):
    return [0.0] * len(completions)


def needs_answer(completions, answer, **kwargs):
    return [0.0] * len(completions)


def rows(*prompts: Any, **columns: Any) -> Dataset:
    return Dataset.from_dict({"prompt": [*prompts], **columns})


def stream(*items: dict) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(items))


FOUR = rows("w0", "w1", "w2", "w3")


def make_config(out: Any, **settings: Any) -> RLOOConfig:
    standard = {
        "per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": 1,
        "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    return RLOOConfig(output_dir=str(out), **{**standard, **settings})


def make_trainer(out: Any, settings: dict | None = None, **arguments: Any) -> Any:
    standard = {
        "model": None, "reward_funcs": zeros, "args": make_config(out, **(settings or {})),
        "train_dataset": FOUR, "processing_class": make_tokenizer(),
    }  # fmt: skip
    arguments = {**standard, **arguments}
    if arguments["model"] is None:
        arguments["model"] = make_model()
    trainer = RLOOTrainer(**arguments)
    trainer.remove_callback(PrinterCallback)
    return trainer


# --- told before the model is loaded


@pytest.fixture
def unloadable(model_dir, monkeypatch):
    """A model's directory from which nothing may be loaded."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    return str(model_dir)


BEFORE_LOADING: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no train_dataset": (
        {"train_dataset": None}, ValueError, "pass a dataset with a 'prompt' column",
    ),
    "a list as dataset": (
        {"train_dataset": ["w0"]}, TypeError, "must be a `Dataset` or .* got `list`",
    ),
    "a DatasetDict as train_dataset": (
        {"train_dataset": DatasetDict(train=FOUR)}, TypeError, "Pass one of its splits",
    ),
    "no column prompt": (
        {"train_dataset": Dataset.from_dict({"question": ["w0"] * 4})},
        ValueError,
        r"has no column 'prompt', only \['question'\]. Rename it",
    ),
    "a dataset of the 2024 trainer": (
        {"train_dataset": Dataset.from_dict({"input_ids": [[1]] * 4})},
        ValueError,
        "Tokenised datasets of the 2024 trainer are not taken: give the text",
    ),
    "images": (
        {"train_dataset": rows("w0", "w1", images=[1, 2])},
        ValueError,
        "image column, but processing_class is a tokenizer: pass .* or remove the column",
    ),
    "images and a text model": (
        {"train_dataset": rows("w0", "w1", image=["a", "b"]), "processing_class": None},
        ValueError,
        "image column, but the model .*model' takes no images: give a vision-language model",
    ),
    "images and torch_compile": (
        {
            "train_dataset": rows("w0", "w1", image=["a", "b"]),
            "settings": {"torch_compile": True},
        },
        ValueError,
        "images, or a processor as processing_class, are not offered with torch_compile=True yet",
    ),
    "no rows": ({"train_dataset": rows()}, ValueError, "train_dataset is empty"),
    "fewer rows than a generation batch": (
        {"train_dataset": rows("w0")},
        ValueError,
        "has 1 prompts, but a generation batch takes 2: give more prompts, or lower",
    ),
    "a stream without max_steps": (
        {"train_dataset": stream({"prompt": "w0"}), "settings": {"max_steps": -1}},
        ValueError,
        "args.max_steps must be set to a positive value .* a streamed train_dataset, was -1",
    ),
    "a stream whose batches are dispatched": (
        {
            "train_dataset": stream({"prompt": "w0"}),
            "settings": {"accelerator_config": {"dispatch_batches": True}},
        },
        ValueError,
        "Iterable datasets require `dispatch_batches=False`",
    ),
    "no column prompt in one of the evaluation sets": (
        {"eval_dataset": {"a": FOUR, "b": Dataset.from_dict({"text": ["w0"]})}},
        ValueError,
        r"eval_dataset\['b'\] has no column 'prompt'",
    ),
    "eval_strategy without eval_dataset": (
        {"settings": {"eval_strategy": "steps"}},
        ValueError,
        "eval_strategy='steps' needs an eval_dataset: pass one",
    ),
    "an unknown reward": (
        {"reward_funcs": "exact_mach"}, ValueError, "is not a reward. Did you mean 'exact_match'",
    ),
    "no reward": ({"reward_funcs": []}, ValueError, "At least one reward function is needed"),
    "a number as reward": ({"reward_funcs": 1.0}, ValueError, "is a callable, .* got float"),
    "a reward that needs another column": (
        {"reward_funcs": needs_answer},
        ValueError,
        "train_dataset: Reward function 'needs_answer' needs `answer`, but the dataset has no such",
    ),
    "a reward that needs a column that evaluation lacks": (
        {
            "reward_funcs": needs_answer,
            "train_dataset": rows(*"wwww", answer=[1, 2, 3, 4]),
            "eval_dataset": FOUR,
        },
        ValueError,
        "^eval_dataset: Reward function 'needs_answer' needs `answer`",
    ),
    "a reward that needs a column that is dropped": (
        {
            "reward_funcs": needs_answer,
            "train_dataset": rows(*"wwww", answer=[1, 2, 3, 4]),
            "settings": {"remove_unused_columns": True},
        },
        ValueError,
        "needs `answer`, but the dataset has no such column",
    ),
    "weights for another number of rewards": (
        {"settings": {"reward_weights": [1.0, 2.0]}}, ValueError, r"weights \(2\) must match",
    ),
    "tokenizers for another number of rewards": (
        {"reward_processing_classes": [None, None]}, ValueError, r"\(2\) must match .* \(1\)",
    ),
    "a model path that is not there": (
        {"model": "./no/such/model"},
        ValueError,
        "'./no/such/model': there is no such directory. Give .* or a hub id such as 'org/name'",
    ),
    "transformers' arguments": (
        {"args": transformers.TrainingArguments(use_cpu=True)},
        TypeError,
        r"must be a rloo_fast.RLOOConfig, got transformers.*TrainingArguments: change the import",
    ),
    "TRL's configuration": (
        {"args": trl.RLOOConfig(use_cpu=True, bf16=False)},
        TypeError,
        r"must be a rloo_fast.RLOOConfig, got trl.*RLOOConfig: change the import",
    ),
    "a dict as peft_config": (
        {"peft_config": {"r": 8}}, TypeError, r"such as LoraConfig\(...\), got dict",
    ),
    "prompt tuning": (
        {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
        ValueError,
        "PromptTuningConfig adds tokens to the prompt, .*: use LoRA",
    ),
    "a moving reference beside adapters": (
        {"peft_config": LoraConfig(), "settings": {"sync_ref_model": True}},
        ValueError,
        "whose reference is no model of its own: set sync_ref_model=False, or train all weights",
    ),
    "2024: config": ({"config": None}, TypeError, "config= is of the 2024 trainer: write args="),
    "2024: policy": ({"policy": None}, TypeError, "policy= is of the 2024 trainer: write model="),
    "2024: ref_policy": ({"ref_policy": None}, TypeError, "ref_policy= .*: leave it out"),
    "2024: reward_model": ({"reward_model": None}, TypeError, "reward_model= .* reward_funcs="),
    "2024: data_collator": ({"data_collator": None}, TypeError, "data_collator= .*leave it out"),
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE_LOADING)
def test_it_is_told_before_the_model_is_loaded(case, unloadable, tmp_path):
    arguments, error, message = BEFORE_LOADING[case]
    with pytest.raises(error, match=message):
        make_trainer(tmp_path / "out", **{"model": unloadable, **arguments})


def test_a_2024_script_is_told_everything_at_once():
    with pytest.raises(TypeError, match=r"config= .*; policy= .*; ref_policy= .*; reward_model= "):
        RLOOTrainer(config=1, policy=2, ref_policy=3, reward_model=4, train_dataset=FOUR)  # pyright: ignore


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json, so no saved model"):
        make_trainer(tmp_path / "out", model=str(tmp_path))


def test_an_output_dir_below_a_file(tmp_path, unloadable):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir .* cannot be written to .*: choose another"):
        make_trainer(tmp_path / "file" / "out", model=unloadable)


# --- told before training


def adapted(**settings: Any) -> Any:
    return get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", **settings))  # pyright: ignore


def broken_template() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[3]['content'] }}"
    return tokenizer


def encoder_decoder() -> Any:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


BEFORE_TRAINING: dict[str, tuple[Any, type[Exception], str]] = {
    "an empty prompt": (
        lambda: {"train_dataset": rows("w0", "")},
        ValueError,
        "train_dataset: a prompt is empty .*Drop such rows",
    ),
    "a prompt without tokens": (
        lambda: {"train_dataset": rows("w0", "  ")}, ValueError, "there is no token to continue",
    ),
    "a missing prompt": (
        lambda: {"train_dataset": rows("w0", None)},
        ValueError,
        "must be a string or a list of .* messages, got None",
    ),
    "a number as prompt": (
        lambda: {"train_dataset": rows(1, 2)}, ValueError, "must be a string or .*, got 1",
    ),
    "a prompt longer than the context": (
        lambda: {"train_dataset": rows("w0", "w1 " * 125)},
        ValueError,
        "has 125 tokens, but only 124 fit .* or lower max_completion_length. .*begins 'w1 w1 ",
    ),
    "an evaluation prompt longer than the context": (
        lambda: {"eval_dataset": {"test": rows("w1 " * 125)}},
        ValueError,
        r"eval_dataset\['test'\]: a prompt has 125 tokens",
    ),
    "a completion longer than the context": (
        lambda: {"settings": {"max_completion_length": 200}},
        ValueError,
        "=200 leaves no room for a prompt in the model's context of 128 tokens: lower it",
    ),
    "a stream without prompts": (
        lambda: {"train_dataset": stream({"text": "w0"})},
        ValueError,
        r"train_dataset has no column 'prompt', only \['text'\]",
    ),
    "a stream without rows": (
        lambda: {"train_dataset": stream()}, ValueError, "ended without a single row",
    ),
    "conversations without a chat template": (
        lambda: {"train_dataset": rows(CHAT, CHAT)},
        ValueError,
        "set tokenizer.chat_template, or make the prompts strings",
    ),
    "a chat template that fails": (
        lambda: {"train_dataset": rows(CHAT, CHAT), "processing_class": broken_template()},
        ValueError,
        r"the chat template fails on a prompt .* The prompt is \[\{'role': 'user'",
    ),
    "neither a pad nor an EOS token": (
        lambda: {"processing_class": make_tokenizer(pad_token=None, eos_token=None)},
        ValueError,
        "set tokenizer.pad_token and tokenizer.eos_token",
    ),
    "no tokenizer": (
        lambda: {"processing_class": None},
        ValueError,
        r"no tokenizer could be loaded .*'built in memory'.*: pass it as processing_class=",
    ),
    "a function as tokenizer": (
        lambda: {"processing_class": str.split}, TypeError, "must be a tokenizer .* got method_d",
    ),
    "a module that is no language model": (
        lambda: {"model": torch.nn.Linear(2, 2)}, TypeError, "causal language model .*got Linear",
    ),
    "a model without a head": (
        lambda: {"model": Qwen2Model(make_model().config)}, TypeError, "got Qwen2Model",
    ),
    "an encoder-decoder model": (
        lambda: {"model": encoder_decoder()}, TypeError, "got T5ForConditionalGeneration",
    ),
    "a configuration as model": (
        lambda: {"model": make_model().config}, TypeError, "got Qwen2Config",
    ),
    "peft_config for a model that has adapters": (
        lambda: {"model": adapted(), "peft_config": LoraConfig()},
        ValueError,
        "merge and unload its adapters first, or leave peft_config out",
    ),
    "a moving reference for a model with adapters": (
        lambda: {"model": adapted(), "settings": {"sync_ref_model": True}},
        ValueError,
        "set sync_ref_model=False, or train all weights",
    ),
    "adapters that are frozen": (
        lambda: {"model": adapted(inference_mode=True)}, ValueError, r"is_trainable=True\), or unf",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE_TRAINING)
def test_it_is_told_before_training(case, tmp_path):
    make, error, message = BEFORE_TRAINING[case]
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, **make())


def test_adapters_loaded_for_inference(tmp_path):
    adapted().save_pretrained(tmp_path / "adapters")
    model = PeftModel.from_pretrained(make_model(), str(tmp_path / "adapters"))
    with pytest.raises(ValueError, match="no parameter to train, all are frozen"):
        make_trainer(tmp_path, model=model)


def test_a_module_without_args_is_refused_for_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default output_dir is made here
    with pytest.raises(TypeError, match=r"causal language model .*got Linear"):
        make_trainer(tmp_path, model=torch.nn.Linear(2, 2), args=None, train_dataset=rows(*"w" * 9))


def test_a_missing_pad_token_is_taken_from_eos_and_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "rloo_fast"):
        trainer = make_trainer(tmp_path, processing_class=make_tokenizer(pad_token=None))
    assert "The tokenizer has no pad token: its EOS token '<eos>' is used." in caplog.messages
    assert trainer.processing_class.pad_token_id == trainer.model.config.pad_token_id == 1


def test_evaluation_without_a_dataset(tmp_path):
    with pytest.raises(ValueError, match="evaluation requires an eval_dataset: pass one"):
        make_trainer(tmp_path).evaluate()


# --- told in the first step, before anything was learnt


def raises(completions, **kwargs):
    raise KeyError("score")


RETURNED: dict[str, tuple[Any, str]] = {
    "too few": ([1.0], r"returned 1 rewards, but 4 were expected: .* None where it does not apply"),
    "nan": ([0.0, float("nan"), 0.0, 0.0], r"returned nan for sample 1 \(prompt '.*return None"),
    "inf": ([0.0, 0.0, float("inf"), 0.0], r"returned inf for sample 2 \(prompt 'w"),
    "text": (["0.5"] * 4, r"returned '0.5' \(str\), not a number or None, for sample 0"),
    "nothing": (None, r"got NoneType. Is a `return` missing\?"),
}


@pytest.mark.parametrize("case", RETURNED)
def test_a_reward_function_that_returns_something_else(case, tmp_path):
    value, message = RETURNED[case]

    def judge(completions, **kwargs):
        return value

    trainer = make_trainer(tmp_path, reward_funcs=judge)
    with pytest.raises(ValueError, match="Reward function 'judge' .*" + message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_reward_function_that_raises(tmp_path):
    trainer = make_trainer(tmp_path, reward_funcs=raises)
    with pytest.raises(RewardError, match="Reward function 'raises' raised KeyError: 'score'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_strings_and_conversations_in_one_stream(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "w1"
    mixed = stream({"prompt": "w0"}, {"prompt": CHAT})
    trainer = make_trainer(tmp_path, train_dataset=mixed, processing_class=tokenizer)
    with pytest.raises(ValueError, match="make all of them strings, or all of them lists"):
        trainer.train()
