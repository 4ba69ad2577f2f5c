"""Rewards of your own, four kinds of them: `python examples/own_environment.py`.

The dataset has two kinds of prompts. "say 3" wants the number and nothing else; "talk" has no right
answer. Each row carries columns of its own (`answer`, `limit`), which every reward function gets as
one value per completion. Without --model_name_or_path the model is a tiny one with random weights.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile

from datasets import Dataset
from tiny_model import tiny_model
from transformers import PrinterCallback

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.rewards import completion_text

NUMBERS = [str(number) for number in range(5)]
WORDS = ["say", "talk", "please", "um", *NUMBERS]


def correct(completions, answer, log_extra, **kwargs):
    """1 if the first word is the answer; None, "does not apply", where there is no answer."""
    first = [(completion_text(c).split() or [""])[0] for c in completions]
    log_extra("first word", first)
    return [
        None if gold is None else float(word == gold)
        for word, gold in zip(first, answer, strict=True)
    ]


def brief(completion_ids, limit, **kwargs):
    """0 within the row's limit of tokens, else down to -1; `limit` is a column of the dataset."""
    return [
        -min(max(len(ids) - most, 0) / most, 1.0)
        for ids, most in zip(completion_ids, limit, strict=True)
    ]


async def polite(prompts, completions, **kwargs):
    """1 without "um", asked of a judge for all completions at once."""

    async def ask(text: str) -> float:
        await asyncio.sleep(0.001)  # here an HTTP client would wait for the judge's answer
        return 0.0 if "um" in text.split() else 1.0

    return await asyncio.gather(*(ask(completion_text(c)) for c in completions))


class Varied:
    """Takes `penalty` off a completion of "talk" that is among the last `memory` ones."""

    def __init__(self, penalty: float = 0.2, memory: int = 64):
        self.penalty, self.memory = penalty, memory
        self.seen: list[str] = []

    def __call__(self, completions, answer, log_metric, **kwargs):
        texts = [completion_text(c) for c in completions]
        free = [gold is None for gold in answer]
        repeated = [is_free and t in self.seen for t, is_free in zip(texts, free, strict=True)]
        self.seen += [text for text, is_free in zip(texts, free, strict=True) if is_free]
        self.seen = self.seen[-self.memory :]
        log_metric("different texts", len({*self.seen}))
        return [-self.penalty * float(again) for again in repeated]


REWARDS = ("correct", "brief", "polite", "Varied")  # as the trainer names them in its metrics


def make_rows(seed: int = 0, count: int = 400) -> list[dict]:
    """Three prompts of four have an answer."""
    drawn = random.Random(seed)
    rows = []
    for _ in range(count):
        number = drawn.choice(NUMBERS)
        if drawn.random() < 0.75:
            rows.append({"prompt": f"say {number}", "answer": number, "limit": 2})
        else:
            rows.append({"prompt": "talk please", "answer": None, "limit": 6})
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Train; what the trainer logged."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", help="directory or hub id [a tiny new model]")
    parser.add_argument("--output_dir", help="where to save the model [nowhere]")
    parser.add_argument("--max_steps", type=int, default=150)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    options = parser.parse_args(argv)

    model, tokenizer = options.model_name_or_path, None
    if model is None:
        model, tokenizer = tiny_model(WORDS)
    with tempfile.TemporaryDirectory() as temporary:
        trainer = RLOOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=[correct, brief, polite, Varied(penalty=0.2)],
            args=RLOOConfig(
                output_dir=options.output_dir or temporary,
                reward_weights=[1.0, 0.2, 0.2, 0.2],
                num_generations=8,
                per_device_train_batch_size=64,
                max_completion_length=8,
                max_steps=options.max_steps,
                learning_rate=options.learning_rate,
                beta=0.0,
                bf16=False,
                logging_steps=options.max_steps // 6 or 1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=0,
            ),
            train_dataset=Dataset.from_list(make_rows()),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if options.output_dir:
            trainer.save_model()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    for log in logs:
        of_each = {name: log[f"rewards/{name}/mean"] for name in REWARDS}
        shown = "  ".join(f"{name} {value:.2f}" for name, value in of_each.items())
        print(f"step {log['step']:3d}  reward {log['reward']:.2f} of  {shown}")
    return logs


if __name__ == "__main__":
    main()
