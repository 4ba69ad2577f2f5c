"""A run whose sampling and training take stated times, asleep: what is left is the trainer's own.

Lengths of a batch's completions are those of a log-normal distribution (sigma 1), scaled so that
the longest takes `generate_s`; all of a batch are sampled at a time. The update of a tiny model is
real, and lasts until `train_s` are over.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from benchmarks.common import models
from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.records import Bucket, Sampling
from rloo_fast.rollout import register_engine
from rloo_fast.rollout.ahead import RequestEngine, Sampled
from rloo_fast.rollout.settings import EngineSettings

K, NUM_PROMPTS, TOKENS = 4, 4, 4
SIGMA = 1.0


def seconds_of_rows(generate_s: float, num_rows: int) -> list[float]:
    """What the completions of a batch take; the longest of them `generate_s`."""
    draw = random.Random(0)
    lengths = [draw.lognormvariate(0, SIGMA) for _ in range(num_rows)]
    return [length / max(lengths) * generate_s for length in lengths]


@register_engine("scripted")
class ScriptedEngine(RequestEngine):
    """Each completion has a few tokens and takes as long as its place in its batch says."""

    generate_s = 1.0

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> Self:
        return cls()

    def __init__(self) -> None:
        super().__init__()
        self._seconds = seconds_of_rows(self.generate_s, K * NUM_PROMPTS)
        self._num_asked, self._loaded = 0, -1

    def _load(self, version: int, buckets: Iterable[Bucket]) -> None:
        for _ in buckets:
            pass
        self._loaded = version

    def complete(self, prompt_ids: list[int], seed: int, prepared: Sampling) -> Sampled:
        place, self._num_asked = self._num_asked % len(self._seconds), self._num_asked + 1
        version = self._loaded
        time.sleep(self._seconds[place])
        draw = random.Random(seed)
        ids = [draw.randrange(models.NUM_SPECIAL, models.NUM_WORDS) for _ in range(TOKENS)]
        return Sampled(ids, "length", [-math.log(models.NUM_WORDS)] * TOKENS, [version] * TOKENS)


class Clock(TrainerCallback):
    """Lets the update last, and notes when each step has ended."""

    def __init__(self, train_s: float):
        self.train_s, self.collected_at, self.ended = train_s, 0.0, list[float]()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        left = self.collected_at + self.train_s - time.perf_counter()
        time.sleep(max(left, 0.0))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended.append(time.perf_counter())


def step_seconds(
    folder: Path, max_staleness: int, generate_s: float, train_s: float, steps: int
) -> list[float]:
    """Seconds of every step but the first, which nothing can be sampled ahead of."""
    if not (folder / "model").is_dir():
        models.save_model("tiny", folder / "model")
    ScriptedEngine.generate_s = generate_s
    shape = models.Shape("scripted", 8, TOKENS, K, NUM_PROMPTS * (steps + 1))
    args = RLOOConfig(
        str(folder / "out"), per_device_train_batch_size=K * NUM_PROMPTS, num_generations=K,
        max_completion_length=TOKENS, max_steps=steps + 1, rollout_engine="scripted", beta=0.0,
        max_staleness=max_staleness, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, gradient_checkpointing=False, logp_diff_stop=0, logp_diff_warn=0,
    )  # fmt: skip
    trainer: Any = RLOOTrainer(
        str(folder / "model"),
        models.fixed_reward,
        args,
        Dataset.from_dict({"prompt": models.prompt_texts(shape)}),
        processing_class=models.make_tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    clock = Clock(train_s)
    trainer.add_callback(clock)
    collect = trainer.source.next

    def timed(*given: Any) -> Any:
        collected = collect(*given)
        clock.collected_at = time.perf_counter()
        return collected

    trainer.source.next = timed
    trainer.train()
    trainer.end()
    return [end - begin for begin, end in zip(clock.ended, clock.ended[1:], strict=False)]
