"""The files of docs/extending.md, each written to a folder and used for what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from rloo_fast import RLOOConfig, RLOOTrainer, cli
from rloo_fast.batching import layouts
from rloo_fast.batching.micro_batches import make_micro_batch
from rloo_fast.objective import losses
from rloo_fast.policy.forward import Policy
from rloo_fast.rollout import registry
from tests.support import judge_runs
from tests.support.batches import generation_batch
from tests.support.pages import commands, files_shown
from tests.support.paths import ROOT
from tests.support.tiny import make_model, make_tokenizer

PAGE = ROOT / "docs" / "extending.md"
FILES = files_shown(PAGE)
SHORT, LONG = "w1 w2", "w3 w4 w5 w6 w7 w8 w9 w10 w11 w12"  # fewer than 8 tokens, and more
K, ROWS = 4, 8


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The page's files, in the current directory; what they register is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tables = (losses.LOSSES, layouts.LAYOUTS, registry.ENGINES)
    kept = [dict(table) for table in tables]
    for name, code in FILES.items():
        Path(name).write_text(code)
    yield tmp_path
    for table, entries in zip(tables, kept, strict=True):
        table.clear()
        table.update(entries)


class Watch(TrainerCallback):
    """A reward function that keeps what it was given, and the weights after every step."""

    __name__ = "watched"

    def __init__(self, model):
        self.prompts: list[str] = []
        self.ids: list[list[int]] = []
        self.rewards: list[float] = []
        self.model, self.weights = model, [self.copy(model)]

    def __call__(self, prompts, completion_ids, **kwargs):
        rewards = [float(len({*ids})) for ids in completion_ids]
        self.prompts += prompts
        self.ids += completion_ids
        self.rewards += rewards
        return rewards

    def copy(self, model):
        return {name: weight.clone() for name, weight in model.state_dict().items()}

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(self.copy(self.model))


def trained(**fields):
    """(trainer, what was watched, its logs) of a few steps on a short and a long prompt."""
    model = make_model()
    watch = Watch(model)
    args = RLOOConfig(
        **{
            "output_dir": "out", "per_device_train_batch_size": ROWS, "num_generations": K,
            "max_completion_length": 6, "max_steps": 2, "learning_rate": 0.02, "beta": 0.0,
            "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
            "report_to": "none", "use_cpu": True, "disable_tqdm": True,
            "gradient_checkpointing": False, **fields,
        }
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": [SHORT, LONG] * 4})
    trainer = RLOOTrainer(
        model, watch, args, rows, processing_class=make_tokenizer(), callbacks=[watch]
    )
    trainer.train()
    return trainer, watch, [log for log in trainer.state.log_history if "loss" in log]


def test_every_file_is_named_in_a_command_and_is_short():
    named = re.findall(r"(my_\w+\.py):", " ".join(w for c in commands(PAGE.read_text()) for w in c))
    assert sorted(named) == sorted(FILES)
    assert len(FILES) == 5
    for name, code in FILES.items():
        assert sum(bool(line.strip()) for line in code.splitlines()) <= 17, name


def test_the_command_line_takes_all_of_them_and_the_reward_is_what_it_logs():
    judge_runs.saved("model", judge_runs.tiny_llama())
    Path("rows.jsonl").write_text('{"prompt": "w1 w2"}\n' * 8)
    command = ["train", "--model_name_or_path", "model", "--dataset_name", "rows.jsonl",
               "--reward_funcs", "my_reward.py:distinct", "--rollout_engine", "my_engine.py:logged",
               "--loss", "my_loss.py:rloo_tokens", "--layout", "my_layout.py:share_long_prompts",
               "--output_dir", "out", "--max_steps", "2", "--per_device_train_batch_size", "4",
               "--gradient_accumulation_steps", "1", "--max_completion_length", "6",
               "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none",
               "--use_cpu", "--no_bf16"]  # fmt: skip
    assert cli.main(command) == 0
    sampled = [json.loads(line) for line in Path("sampled.jsonl").read_text().splitlines()]
    shares = [len({*ids}) / len(ids) for ids in sampled]
    assert len(shares) == 2 * 4
    assert min(shares) < 1
    logged = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    rewards = [log["reward"] for log in logged if "reward" in log]
    assert rewards == pytest.approx([sum(shares[:4]) / 4, sum(shares[4:]) / 4], rel=1e-5)
    card = Path("out/README.md").read_text()
    assert "my_loss.py:rloo_tokens" in card


def token_logps(watch, weights):
    """Log-probs of each completion, from a forward of its row alone."""
    model = make_model().double()
    model.load_state_dict(weights)
    found = []
    for prompt, ids in zip(watch.prompts, watch.ids, strict=True):
        row = make_tokenizer()(prompt).input_ids + ids
        logps = model(torch.tensor([row])).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
        found.append(logps.gather(-1, torch.tensor(ids)[:, None])[:, 0])
    return found


@pytest.mark.parametrize("imported", [False, True], ids=["named by its file", "imported"])
def test_the_loss_has_a_ratio_per_token_and_its_own_denominator(imported):
    """Two steps on the same completions, so that the second one has ratios to clip."""
    if imported:
        exec(FILES["my_loss.py"], {})
    name = "rloo_tokens" if imported else "my_loss.py:rloo_tokens"
    trainer, watch, logs = trained(loss=name, num_iterations=2)
    assert trainer.args.loss == "rloo_tokens"
    assert len(watch.ids) == ROWS
    with torch.no_grad():
        old, new = (token_logps(watch, weights) for weights in watch.weights[:2])
    rewards = torch.tensor(watch.rewards, dtype=torch.float64).view(-1, K)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) * K / (K - 1)).flatten()

    def by_hand(log_ratios):
        total = 0.0
        for log_ratio, advantage in zip(log_ratios, advantages, strict=True):
            ratio = log_ratio.exp()
            total -= torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
        return float(total) / (100 * ROWS)

    log_ratios = [b - a for a, b in zip(old, new, strict=True)]
    second = by_hand(log_ratios)
    per_completion = by_hand([x.sum()[None] for x in log_ratios])
    assert logs[0]["loss"] == pytest.approx(by_hand([x * 0 for x in log_ratios]), rel=1e-4)
    assert logs[1]["loss"] == pytest.approx(second, rel=1e-4)
    assert abs(second - per_completion) > 0.1 * abs(second)
    assert logs[1]["clip_ratio/region_mean"] > 0


def test_the_layout_gives_the_log_probs_and_losses_of_padded_rows():
    trainer, _, logs = trained(layout="my_layout.py:share_long_prompts", beta=0.1)
    assert trainer.args.layout == "share_long_prompts"
    assert trainer.update.planner.layout.name == "share_long_prompts"
    _, _, expected = trained(layout="padded", beta=0.1)
    for log, other in zip(logs, expected, strict=True):
        for name in ("loss", "kl", "grad_norm"):
            assert log[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)

    tokenizer = make_tokenizer()
    prompts = [tokenizer(text).input_ids for text in (SHORT, LONG)]
    completions = [[9, 8, 7, 6], [6, 5, 1], [5, 4, 9, 9, 8], [7, 1]]
    batch = generation_batch(
        prompt_ids=[prompts[0], prompts[0], prompts[1], prompts[1]],
        completion_ids=completions,
        num_tokens=[4, 3, 5, 2],
        groups=[0, 0, 1, 1],
    )
    found = {}
    for name in ("padded", "share_long_prompts"):
        micro_batch = make_micro_batch(
            batch, [[0, 1], [2, 3]], layouts.LAYOUTS[name], device=torch.device("cpu"),
            pad_token_id=0,
        )  # fmt: skip
        with torch.no_grad():
            found[name] = Policy(make_model().double(), temperature=1.0).logps(micro_batch).logps
        if name == "share_long_prompts":  # the short prompt twice, the long one once
            assert micro_batch.input_ids.shape == (1, (2 + 3) + (2 + 2) + 10 + 4 + 1)
    assert torch.allclose(*found.values(), rtol=0, atol=1e-6)


def test_the_engines_completions_are_those_that_are_rewarded_and_trained_on():
    trainer, watch, logs = trained(rollout_engine="my_engine.py:logged")
    assert type(trainer.rollouts.engine).__name__ == "LoggedEngine"
    sampled = [json.loads(line) for line in Path("sampled.jsonl").read_text().splitlines()]
    assert sampled == watch.ids
    assert len(sampled) == 2 * ROWS
    assert logs[-1]["num_tokens"] == sum(map(len, sampled)) + 2 * K * (2 + 10)


def test_the_judges_verdicts_are_counted():
    rows = judge_runs.rows_file()
    shorter = ["w7"] * 6 + [row["completion"].strip() for row in rows[6:8]] + ["w7 " * 40] * 4
    judge_runs.texts_file("a.jsonl", shorter, rows)
    judge_runs.run("--completions", "a.jsonl", "--judge", "my_judge.py:fewer_words")
    figures = judge_runs.result()[0]["figures"]
    # the references have 1, 2, ... 12 words: one tie at 1 word, five wins, two ties, four losses
    assert figures["num_decided"] == 9
    assert figures["win_rate"] == 5 / 9


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"loss": "my_loss.py:rloo_token"}, "my_loss.py does not register a loss named 'rloo_tok"),
        ({"layout": "my_loss.py:padding"}, "my_loss.py does not register a layout named 'padding'"),
        ({"loss": "no_such.py:mine"}, "loss='no_such.py:mine' could not be loaded: FileNotFound"),
        ({"layout": "no_such.mine:it"}, "layout='no_such.mine:it' could not be loaded: ModuleNot"),
        ({"loss": "rloo_tokens"}, r"loss must be one of \('rloo', "),
    ],
    ids=str,
)
def test_a_name_that_no_file_registers_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        RLOOConfig("out", use_cpu=True, **given)
