"""What users of TRL do with the trainer: adapters, rewards of every kind, callbacks, evaluation
sets, streams, conversations, saving. Each on a tiny model for a few steps."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    TrainerCallback,
)

from rloo_fast import RLOOConfig, RLOOTrainer
from tests.support.tiny import CHAT_TEMPLATE, make_model, make_tokenizer

LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def rows(num: int = 16, first: int = 0, **columns: Any) -> Dataset:
    prompts = [" ".join(f"w{(first + i + j) % 26}" for j in range(1 + i % 3)) for i in range(num)]
    return Dataset.from_dict({"prompt": prompts, **{k: [v] * num for k, v in columns.items()}})


def varied(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]


def make_trainer(out: Path, **given: Any) -> Any:
    """A trainer with RLOOTrainer's arguments as they are, and RLOOConfig's beside them."""
    names = ("model", "reward_funcs", "train_dataset", "eval_dataset", "processing_class",
             "reward_processing_classes", "callbacks", "optimizers", "peft_config")  # fmt: skip
    arguments: dict[str, Any] = {name: given.pop(name) for name in names if name in given}
    standard: dict[str, Any] = {
        "model": None, "reward_funcs": varied, "train_dataset": rows(),
        "processing_class": make_tokenizer(),
    }  # fmt: skip
    arguments = {**standard, **arguments}
    if arguments["model"] is None:
        arguments["model"] = make_model()
    settings = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "logging_steps": 1,
        "max_completion_length": 4, "max_steps": 2, "save_strategy": "no", "learning_rate": 0.01,
        "use_cpu": True, "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    config = RLOOConfig(output_dir=str(out / "out"), **{**settings, **given})
    trainer = RLOOTrainer(args=config, **arguments)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(out: Path, **given: Any) -> Any:
    trainer = make_trainer(out, **given)
    trainer.train()
    return trainer


def step_logs(trainer: Any) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before: dict[str, torch.Tensor], model: Any) -> set[str]:
    return {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}


def keep_batches(trainer: Any) -> list[Any]:
    """The PreparedBatch of every rollout, with the reference's log-probs."""
    kept, original = [], trainer.update.preparer.with_reference

    def with_reference(batch, wrapped):
        kept.append(original(batch, wrapped))
        return kept[-1]

    trainer.update.preparer.with_reference = with_reference
    return kept


def logps_of(model: Any, batch: Any) -> torch.Tensor:
    """Log-probs of the completions, row by row, from the model's own logits."""
    out = []
    rows = batch.generation
    for prompt, completion in zip(rows.prompt_ids, rows.completion_ids, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        out.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(out)


def test_the_reward_that_is_trained_on_goes_up(tmp_path):
    def share_of_w3(completion_ids, **kwargs):
        return [ids.count(9) / len(ids) for ids in completion_ids]

    logs = step_logs(train(
        tmp_path, reward_funcs=share_of_w3, per_device_train_batch_size=32, num_generations=4,
        max_steps=25, train_dataset=rows(64),
    ))  # fmt: skip
    assert sum(log["reward"] for log in logs[:3]) / 3 < 0.15
    assert sum(log["reward"] for log in logs[-3:]) / 3 > 0.6


# --- adapters


def fresh_adapters(model: Any = None, **settings: Any) -> Any:
    """A PeftModel whose adapter already changes what the model computes."""
    model = get_peft_model(model or make_model(), LoraConfig(**{**LORA, **settings}))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_with_peft_config_only_the_adapters_learn(tmp_path, gradient_checkpointing):
    trainer = make_trainer(
        tmp_path, peft_config=LoraConfig(**LORA), gradient_checkpointing=gradient_checkpointing
    )
    before = weights(trainer.model)
    trainer.train()
    assert changed(before, trainer.model) == {name for name in before if ".lora_" in name}


def test_with_peft_config_the_reference_is_the_model_without_adapters(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(**LORA), max_steps=3)
    kept = keep_batches(trainer)
    trainer.train()
    assert trainer.reference is None
    torch.testing.assert_close(kept[2].ref_logps, logps_of(make_model(), kept[2]))
    assert abs(step_logs(trainer)[2]["objective/kl"]) > 1e-4


def test_a_peft_model_has_a_frozen_copy_of_its_adapter_as_reference(tmp_path):
    start = fresh_adapters()
    trainer = make_trainer(tmp_path, model=fresh_adapters(), max_steps=3)
    kept, before = keep_batches(trainer), weights(trainer.model)
    trainer.train()
    assert changed(before, trainer.model) == {n for n in before if "lora" in n and "default" in n}
    torch.testing.assert_close(kept[2].ref_logps, logps_of(start, kept[2]))


def test_a_peft_model_may_have_another_adapter_name_and_be_trained_twice(tmp_path):
    model = get_peft_model(make_model(), LoraConfig(**LORA), adapter_name="mine")
    train(tmp_path, model=model)
    trainer = make_trainer(tmp_path, model=model)
    kept = keep_batches(trainer)
    trainer.train()
    assert step_logs(trainer)[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert model.active_adapter == "mine"
    assert len(kept) == 2


def test_a_checkpoint_of_a_peft_model_holds_the_adapters_alone(tmp_path):
    start = fresh_adapters()
    start.save_pretrained(tmp_path / "start")
    trainer = train(tmp_path, model=fresh_adapters(), save_strategy="steps", save_steps=2)
    saved = tmp_path / "out/checkpoint-2"
    assert not list(saved.glob("model*.safetensors"))
    before, after = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "start", saved)
    )
    reference = torch.load(saved / "start_weights.pt")
    assert not any(torch.equal(after[name], before[name]) for name in before)
    assert reference.keys() == {n.replace("weight", "default.weight") for n in before}
    assert all(
        torch.equal(reference[n.replace("weight", "default.weight")], before[n]) for n in before
    )
    loaded = PeftModel.from_pretrained(make_model(), str(saved))
    ids = torch.arange(6, 12)[None]
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


# --- rewards


def test_conversations_reach_the_model_by_template_and_the_reward_as_messages(tmp_path):
    seen: list[dict] = []

    def keep(prompts, completions, **kwargs):
        seen.append({"prompts": prompts, "completions": completions})
        return [float(i) for i in range(len(prompts))]

    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = [[{"role": "user", "content": f"w{i}"}] for i in range(4)]
    trainer = make_trainer(
        tmp_path, reward_funcs=keep, processing_class=tokenizer, shuffle_dataset=False,
        train_dataset=Dataset.from_dict({"prompt": chat}), max_steps=1,
    )  # fmt: skip
    kept = keep_batches(trainer)
    trainer.train()
    assert seen[0]["prompts"] == [chat[0], chat[0], chat[1], chat[1]]
    texts = tokenizer.batch_decode(kept[0].generation.completion_ids, skip_special_tokens=True)
    assert seen[0]["completions"] == [[{"role": "assistant", "content": text}] for text in texts]
    assert tokenizer.batch_decode(kept[0].generation.prompt_ids[::2]) == [
        "user w0 assistant",
        "user w1 assistant",
    ]


def test_async_and_sync_rewards_are_summed(tmp_path):
    async def later(completions, **kwargs):
        await asyncio.sleep(0.01)
        return [2.0] * len(completions)

    def now(completions, **kwargs):
        return [1.0] * len(completions)

    log = step_logs(train(tmp_path, reward_funcs=[later, now]))[0]
    assert (log["rewards/later/mean"], log["rewards/now/mean"], log["reward"]) == (2, 1, 3)


def reward_model() -> Any:
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_labels=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    return Qwen2ForSequenceClassification(config).eval()


@pytest.mark.parametrize("how", ["module", "directory"])
def test_a_reward_model_scores_prompt_and_completion(tmp_path, how):
    model = reward_model()
    model.save_pretrained(tmp_path / "judge")
    trainer = train(
        tmp_path, max_steps=1, log_completions=True,
        reward_funcs=reward_model() if how == "module" else str(tmp_path / "judge"),
        reward_processing_classes=make_tokenizer(),
        generation_kwargs={"suppress_tokens": list(range(6))},  # texts that can be tokenised again
    )  # fmt: skip
    table, wanted = trainer.recorder.samples.table("train", 1), []
    for prompt, completion in zip(table["prompt"], table["completion"], strict=True):
        ids = make_tokenizer()(prompt + completion, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            wanted.append(model(ids).logits[0, 0].item())
    rewards = list(table["Qwen2ForSequenceClassification" if how == "module" else "judge"])
    assert rewards == pytest.approx(wanted, abs=1e-5)
    assert len({round(value, 3) for value in rewards}) > 1


def test_weights_and_none_of_several_rewards(tmp_path):
    def sometimes(completions, **kwargs):
        return [None if i % 2 else 3.0 for i in range(len(completions))]

    def always(completions, **kwargs):
        return [1.0] * len(completions)

    given = {"reward_funcs": [sometimes, always], "reward_weights": [2.0, -1.0]}
    log = step_logs(train(tmp_path, **given))[0]
    assert log["reward"] == (2 * 3 - 1 - 1) / 2
    assert (log["rewards/sometimes/mean"], log["rewards/always/mean"]) == (3, 1)


def test_what_rewards_log_is_in_the_table_and_the_logs(tmp_path, capsys, monkeypatch):
    def judge(completions, log_extra, log_metric, **kwargs):
        log_extra("verdict", [f"said-{i}" for i in range(len(completions))])
        log_metric("share", 0.25)
        return [1.0] * len(completions)

    monkeypatch.setenv("COLUMNS", "200")
    trainer = train(tmp_path, reward_funcs=judge, log_completions=True, max_steps=1)
    assert step_logs(trainer)[0]["share"] == 0.25
    assert "said-3" in capsys.readouterr().out


def test_rewards_get_the_columns_and_the_trainers_state(tmp_path):
    seen: list[Any] = []

    def keep(answer, trainer_state, completions, **kwargs):
        seen.append((answer, trainer_state.global_step, trainer_state.max_steps))
        return [0.0] * len(completions)

    train(tmp_path, reward_funcs=keep, train_dataset=rows(answer="w5"))
    assert seen == [(["w5"] * 4, 0, 2), (["w5"] * 4, 1, 2)]


# --- callbacks and optimizers


class Count(TrainerCallback):
    def __init__(self):
        self.events: list[str] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"step {state.global_step}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append("log" if "reward" in logs else "summary")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append(f"evaluated {'eval_reward' in metrics}")

    def on_save(self, args, state, control, **kwargs):
        self.events.append("save")


def test_callbacks_are_called_as_in_transformers(tmp_path):
    count = Count()
    train(
        tmp_path, callbacks=[count], eval_dataset=rows(2), eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    assert [event for event in count.events if event != "summary"] == [
        "step 1", "log", "step 2", "log", "evaluated True", "save",
    ]  # fmt: skip


class StopAfterOne(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_callback_can_stop_the_run(tmp_path):
    assert train(tmp_path, callbacks=[StopAfterOne()]).state.global_step == 1


def test_an_optimizer_and_a_schedule_of_ones_own(tmp_path):
    model = make_model()
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    optimizer = torch.optim.SGD(norms, lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)
    before = weights(model)
    trainer = train(tmp_path, model=model, optimizers=(optimizer, schedule))
    assert changed(before, model) == {name for name in before if "norm" in name}
    assert [log["learning_rate"] for log in step_logs(trainer)] == pytest.approx([0.5, 0.05])


# --- data


def test_a_streamed_dataset_is_read_in_order(tmp_path):
    seen: list[str] = []

    def keep(prompts, **kwargs):
        seen.extend(prompts[::2])
        return [0.0] * len(prompts)

    stream = IterableDataset.from_generator(lambda: ({"prompt": f"w{i}"} for i in range(5)))
    train(
        tmp_path, reward_funcs=keep, train_dataset=stream, shuffle_dataset=False, max_steps=3,
        eval_dataset=stream,
    )  # fmt: skip
    assert seen == ["w0", "w1", "w2", "w3", "w4", "w0"]


def test_evaluation_before_and_after_training(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=rows(5))
    first = trainer.evaluate()
    again = trainer.evaluate()
    assert first["eval_reward"] == again["eval_reward"]
    assert first["eval_kl"] == pytest.approx(0, abs=1e-6)
    trainer.train()
    assert abs(trainer.evaluate()["eval_kl"]) > 1e-4


def test_an_evaluation_set_may_be_streamed(tmp_path):
    stream = rows(5).to_iterable_dataset()
    metrics = [make_trainer(tmp_path, eval_dataset=d).evaluate() for d in (rows(5), stream)]
    assert metrics[0]["eval_reward"] == metrics[1]["eval_reward"]


def test_one_completion_per_prompt_in_evaluation_has_a_reward_and_no_advantage(tmp_path):
    metrics = make_trainer(tmp_path, eval_dataset=rows(5), num_generations_eval=1).evaluate()
    assert metrics["eval_reward"] > 0
    assert metrics["eval_loss"] == 0


def test_every_evaluation_set_of_a_dict_has_metrics_of_its_own(tmp_path):
    def number_of_tokens(prompts, **kwargs):
        return [float(len(prompt.split())) for prompt in prompts]

    sets = {
        "short": Dataset.from_dict({"prompt": ["w1"] * 2}),
        "long": Dataset.from_dict({"prompt": ["w1 w2 w3"] * 2}),
    }
    trainer = make_trainer(tmp_path, reward_funcs=number_of_tokens, eval_dataset=sets)
    metrics = trainer.evaluate()
    assert (metrics["eval_short_reward"], metrics["eval_long_reward"]) == (1, 3)


def test_an_evaluation_may_have_a_prefix_of_its_own(tmp_path):
    trainer = train(tmp_path)
    metrics = trainer.evaluate(rows(2), metric_key_prefix="test")
    assert metrics["test_reward"] > 0


# --- what is left behind


def test_a_saved_model_computes_the_same(tmp_path):
    trainer = train(tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(6, 26).view(2, 10)
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_a_checkpoint_has_a_model_card_without_the_hubs_token(tmp_path):
    train(
        tmp_path, save_strategy="steps", save_steps=1, max_steps=1, push_to_hub=False,
        hub_model_id="someone/tiny-rloo", hub_token="hf_abcdefghijklmnopqrstuvwxyz",
    )  # fmt: skip
    text = (tmp_path / "out/checkpoint-1/README.md").read_text()
    assert "hf_abc" not in text
    card = ModelCard(text)
    assert card.data["model_name"] == "tiny-rloo"
    assert {"rloo", "rloo_fast"} <= {*card.data["tags"]}


def test_tensorboard_gets_the_metrics(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = train(tmp_path, report_to="tensorboard")
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    values = [event.value for event in board.Scalars("train/reward")]
    assert values == pytest.approx([log["reward"] for log in step_logs(trainer)])
