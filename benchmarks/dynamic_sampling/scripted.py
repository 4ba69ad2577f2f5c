"""A collector whose groups have signal with a given chance, and nothing to sample or to compute."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset

from rloo_fast.data.stream import prompt_stream
from rloo_fast.records import GenerationBatch, RolloutRows
from rloo_fast.rewards.shaping import ScoreSettings
from rloo_fast.step.collect import Collected
from rloo_fast.step.dynamic import StreamSource
from rloo_fast.step.rounds import SampledRounds

K = 2


class ScriptedCollector:
    """Of K = 2 completions the second one is right; the first, too, unless the group has signal:
    with the chance `p`, which follows from the seed of the round and the place in it."""

    def __init__(self, p: float):
        self.p = p
        self.scores = ScoreSettings()
        self.accelerator = SimpleNamespace(
            num_processes=1, process_index=0, is_main_process=True, device="cpu"
        )
        self.rollouts = SimpleNamespace(version=lambda: 0)

    def sample(self, rows: Sequence[Any], k: int, seed: int, mode: str, state: Any) -> Any:
        assert (k, mode) == (K, "train")
        draws = random.Random(seed)
        return [[0.0 if draws.random() < self.p else 1.0, 1.0] for _ in rows]

    def without_scores(self, scored: list[list[float]], k: int) -> GenerationBatch:
        reward = torch.tensor(scored).flatten()
        n = len(reward)
        rows = RolloutRows(
            row=torch.arange(n),
            length=torch.ones(n, dtype=torch.long),
            truncated=torch.zeros(n, dtype=torch.bool),
            rewards=reward[:, None],
            reward=reward,
        )
        return GenerationBatch(
            prompt_ids=[[1]] * n,
            completion_ids=[[2]] * n,
            num_tokens=[1] * n,
            groups=[row // k for row in range(n)],
            scores=reward,
            rows=rows,
            num_generations=k,
            weights_version=0,
        )

    def texts(self, scored: Any) -> None:
        return None

    def failing_together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def finished(self, batch: GenerationBatch, texts: None, scored: Any, mode: str) -> Collected:
        return Collected(batch, 0, {}, texts)


def scripted_source(p: float, *, prompts_per_batch: int, max_rounds: int = 1000) -> StreamSource:
    dataset = Dataset.from_dict(
        {"prompt": [f"prompt {i}" for i in range(max(prompts_per_batch, 64))]}
    )
    stream = prompt_stream(dataset, prompts_per_batch=prompts_per_batch, shuffle=True, seed=0)
    collector: Any = ScriptedCollector(p)
    return StreamSource(
        collector,
        SampledRounds(collector, stream, K),
        stream,
        num_generations=K,
        prompts_per_batch=prompts_per_batch,
        max_rounds=max_rounds,
    )
