"""One process of one trainer under one engine: waits for the parent's word, steps, tells the time.

python -m benchmarks.sharded.worker JSON      {"trainer", "engine", "settings": those of the step}

A line comes in for every step, "step" or "memory"; a line of JSON goes out for it. "memory" gives
the heap's free pages back first, so that they do not serve the step unseen; the most resident
memory of that step, above what the process had before the trainer was made, is what it takes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from contextlib import nullcontext
from typing import Any, TextIO

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from benchmarks.common import memory
from benchmarks.common import models as step_models
from benchmarks.step.providers import LADDER, Settings, head_as_on_a_gpu
from rloo_fast.cli.recipe_files import path_of
from rloo_fast.records import Rollout
from tests.support.cpu_engines import engine_fields  # pyright: ignore[reportMissingImports]  # of tests/


class Turns(TrainerCallback):
    """The clock of `step_providers.Watch`, started when the parent says so."""

    def __init__(self, replies: TextIO, before: int):
        self.replies, self.before = replies, before
        self.start, self.reply = 0.0, {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        word = sys.stdin.readline().strip()
        if word not in ("step", "memory"):
            os._exit(word != "stop")
        if word == "memory":
            memory._give_free_pages_back()
            memory._reset_peak()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self.start
        extra = (memory._status_kib("VmHWM") - self.before) / 1024
        self.reply = {"seconds": seconds, "extra_mib": extra, "threads": torch.get_num_threads()}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            figures = {name: float(logs[name]) for name in ("loss", "grad_norm", "reward_std")}
            print(json.dumps(self.reply | figures), file=self.replies, flush=True)


class Injected(step_models.Injected):
    """The completions of whole groups, of those prompts that this process has."""

    def __init__(self, shape: step_models.Shape, vocab: int):
        super().__init__(shape, vocab)
        groups = self.prompt_ids[:: shape.num_generations]
        self.first_row = {tuple(ids): i * shape.num_generations for i, ids in enumerate(groups)}

    def for_trl(self, prompt_ids: list[list[int]], images: Any, fields: Any) -> list[list[int]]:
        seen: Counter[tuple[int, ...]] = Counter()
        found = []
        for ids in map(tuple, prompt_ids):
            found.append(list(self.completion_ids[self.first_row[ids] + seen[ids]]))
            seen[ids] += 1
        return found

    def _generate(
        self, prompt_ids: list[list[int]], sampling: Any, seeds: Any, on_finished: Any
    ) -> Rollout:
        rows = self.for_trl(prompt_ids, None, None)
        return Rollout(rows, ["stop" if ids[-1] == step_models.EOS else "length" for ids in rows])


def fields_of(engine: str) -> dict[str, Any]:
    """The trainer's arguments for an engine."""
    fields = engine_fields(None if engine == "one" else engine)
    if "deepspeed" in fields:
        fields["deepspeed"] = str(path_of(f"deepspeed/{engine}"))
    return fields


def classes_of(library: str) -> tuple[Any, Any]:
    if library == "trl":
        from trl import RLOOConfig, RLOOTrainer  # pyright: ignore
    else:
        from rloo_fast import RLOOConfig, RLOOTrainer
    return RLOOConfig, RLOOTrainer


def make_trainer(library: str, engine: str, settings: Settings, turns: Turns) -> Any:
    config_class, trainer_class = classes_of(library)
    arguments = settings.trainer_arguments() | {
        "gradient_accumulation_steps": 1,
        "max_steps": 10**6,  # the parent stops us
        **fields_of(engine),
    }
    trainer = trainer_class(
        model=settings.model_folder,
        reward_funcs=step_models.fixed_reward,
        args=config_class(**arguments),
        train_dataset=Dataset.from_dict({"prompt": step_models.prompt_texts(settings.shape)}),
        processing_class=step_models.make_tokenizer(),
        callbacks=[turns],
    )
    trainer.remove_callback(PrinterCallback)
    injected = Injected(settings.shape, trainer.model.config.vocab_size)
    if library == "trl":
        trainer._generate_single_turn = injected.for_trl
    else:
        trainer.rollouts.engine = injected
    return trainer


def main(told: dict[str, Any]) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    fields_of(told["engine"])  # the libraries are not the trainer's memory
    provider = LADDER[told["trainer"]]
    classes_of(provider.library)
    before = memory._status_kib("VmRSS")
    turns = Turns(replies, before)
    settings = Settings(**told["settings"])
    trainer = make_trainer(provider.library, told["engine"], settings, turns)
    with head_as_on_a_gpu() if provider.gpu_head else nullcontext():
        trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
