"""Runs without a model: files by the trainer's own writers, numbers that are drawn."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rloo_fast.records import CompletionTexts
from rloo_fast.reports.metrics_file import MetricsWriter
from rloo_fast.reports.view_files import ViewWriter
from rloo_fast.reports.view_rows import KeptBatch, step_summary, view_table

TEXT = (
    "so the sum of two numbers is even if both are odd or both are even we add them and check "
    "that each step follows from the one before it which gives the answer once more as needed"
)
WORDS = TEXT.split(" ")

Say = Callable[[int, int, int], str]  # (step, group, sample) -> a completion


class MadeRun:
    """A run under way in `folder`: `log` and `keep` write a step, as a trainer would.

    P prompts of K completions of about `num_tokens` tokens. `say`: what completions are, where
    words will not do.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_steps: int,
        num_prompts: int = 64,
        num_generations: int = 8,
        num_tokens: int = 60,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        say: Say | None = None,
        max_mib: int = 1 << 14,
    ):
        self.folder, self.max_steps, self.say = folder, max_steps, say
        self.num_prompts, self.k, self.num_tokens = num_prompts, num_generations, num_tokens
        self.random = np.random.default_rng(seed)
        self.metrics = MetricsWriter(folder)
        self.view = ViewWriter(folder, max_mib)
        settings = {"learning_rate": 1e-6, "beta": 0.05, "max_grad_norm": 1.0, **(config or {})}
        self.view.write_run(
            {
                "max_steps": max_steps,
                "resumed_from": 0,
                "started": 0.0,
                "config": settings,
                "environment": {"python": "3", "device": "cpu"},
            }
        )

    def step(self, step: int, rewards: np.ndarray | None = None) -> None:
        """Everything that a step writes; `rewards` (P K,), drawn where not given."""
        rows, texts, tokens = self._sampled(step, rewards)
        batch = KeptBatch(texts, rows, tokens, self.k)
        limits = {"logp_diff_warn": 3e-4, "logp_diff_stop": 1e-3}
        summary = step_summary(batch) | {"sampled_after": step - 1} | limits
        self.view.write(step, view_table(batch), summary)
        self.metrics.write(step, self._logged(step, rows))

    def end(self) -> None:
        self.metrics.write(self.max_steps, {"train_runtime": 1.0, "train_loss": 0.0})

    def _sampled(self, step: int, rewards: np.ndarray | None) -> tuple[Any, Any, Any]:
        number = self.num_prompts * self.k
        say = self.say or self._words
        said = [say(step, row // self.k, row % self.k) for row in range(number)]
        pieces = [[f" {word}" if i else word for i, word in enumerate(t.split(" "))] for t in said]
        lengths = torch.tensor([len(one) for one in pieces], dtype=torch.double)
        if rewards is None:
            level = 1 - math.exp(-3 * step / self.max_steps)
            rewards = np.clip(self.random.normal(level, 0.25, number), 0, 1)
        reward = torch.tensor(rewards, dtype=torch.double)
        groups = reward.view(-1, self.k)
        advantage = (groups - (groups.sum(1, keepdim=True) - groups) / (self.k - 1)).view(-1)
        rows = {
            "reward": reward,
            "score": reward,
            "advantage": advantage,
            "kl": torch.tensor(self.random.normal(0.5, 0.2, number)),
            "length": lengths,
            "truncated": torch.tensor(self.random.random(number) < 0.03),
        }
        prompts = [
            f"Problem {(step * 7 + row // self.k) % 512}: is the sum even?" for row in range(number)
        ]
        parts = {"correct": reward.round().tolist(), "format": [1.0] * number}
        texts = CompletionTexts(prompts, said, parts, {})
        return rows, texts, {row: self._tokens(one) for row, one in enumerate(pieces)}

    def _words(self, step: int, group: int, sample: int) -> str:
        count = self.random.integers(self.num_tokens // 2, self.num_tokens * 3 // 2)
        return " ".join(self.random.choice(WORDS, count))

    def _tokens(self, pieces: list[str]) -> dict[str, Any]:
        drawn = self.random.exponential(1.0, (3, len(pieces))).astype(np.float16)
        diff = self.random.normal(0, 1e-4, len(pieces)).astype(np.float16)
        logp, entropy, kl = -drawn[0], drawn[1], drawn[2] - np.float16(1)
        return {"text": pieces, "logp": logp, "entropy": entropy, "kl": kl, "sampler_diff": diff}

    def _logged(self, step: int, rows: dict[str, Any]) -> dict[str, float]:
        noise, share = self.random.normal, step / self.max_steps
        names = [f"more/metric_{i}" for i in range(40)]
        return {
            "reward": float(rows["reward"].mean()),
            "rewards/correct/mean": float(rows["reward"].round().mean()),
            "kl": 0.1 * share + abs(noise(0, 0.01)),
            "entropy": 1.2 - 0.8 * share + noise(0, 0.02),
            "loss": noise(0, 1e-3),
            "grad_norm": abs(noise(0.6, 0.2)),
            "learning_rate": 1e-6 * (1 - share),
            "completions/mean_length": float(rows["length"].mean()),
            "completions/clipped_ratio": float(rows["truncated"].double().mean()),
            "frac_reward_zero_std": 0.1 + 0.2 * share,
            "sampling/logp_diff_judged": abs(noise(1e-5, 1e-6)),
            "step_time": 2.0 + abs(noise(0, 0.1)),
            "time/rollout_s": 1.1,
            "time/reward_s": 0.1,
            "time/reference_s": 0.2,
            "time/policy_s": 0.5,
            "time/optimizer_s": 0.05,
            "throughput/completion_tokens_per_s": 15_000 + noise(0, 300),
            "num_tokens": step * 40_000,
            **{name: noise() for name in names},
        }


def lock(folder: Path, process: int) -> None:
    """As a run that is under way holds it."""
    (folder / ".rloo_lock").write_text(f"process {process} on {socket.gethostname()}\n")
