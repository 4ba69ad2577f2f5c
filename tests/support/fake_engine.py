"""A rollout engine without a model: what it samples follows from prompt and seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from rloo_fast.data.seeds import step_seed
from rloo_fast.records import Bucket, Rollout, Sampling
from rloo_fast.rollout.engine import OnFinished, RolloutEngine


class FakeEngine(RolloutEngine):
    """Notes in `calls` what it is asked, refused or not, and keeps copies of the weights it got.

    Tokens are drawn from [3, vocab_size). Completions are 1 .. max_new_tokens long; those that are
    shorter end with a stop token. `logps=False`: it has no log-probs to give. `fails_after`: that
    many buckets of the next load arrive, then it raises.
    """

    def __init__(
        self,
        calls: list[tuple[Any, ...]] | None = None,
        *,
        vocab_size: int = 32,
        logps: bool = True,
    ):
        super().__init__()
        self.calls: list[tuple[Any, ...]] = [] if calls is None else calls
        self.vocab_size, self.logps = vocab_size, logps
        self.fails_after: int | None = None
        self.weights: dict[str, Tensor] = {}

    def wake(self, tags: Sequence[str]) -> None:
        self.calls.append(("wake", tuple(tags)))
        super().wake(tags)

    def load_weights(self, version: int, buckets: Iterable[Bucket]) -> None:
        self.calls.append(("load_weights", version))
        super().load_weights(version, buckets)

    def generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        version: int,
        on_finished: OnFinished | None = None,
    ) -> Rollout:
        self.calls.append(("generate", version))
        return super().generate(
            prompt_ids, sampling, seeds, version=version, on_finished=on_finished
        )

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))
        super().sleep(level)

    def close(self) -> None:
        self.calls.append(("close",))
        super().close()

    def _sleep(self, level: int) -> None:
        if level == 2:
            self.weights = {}

    def _load(self, version: int, buckets: Iterable[Bucket]) -> None:
        for number, bucket in enumerate(buckets):
            if number == self.fails_after:
                self.fails_after = None
                raise RuntimeError("the engine was told to fail in the middle of a load")
            self.weights |= {name: tensor.detach().clone() for name, tensor in bucket}

    def _generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished,
    ) -> Rollout:
        completions, reasons, logps = [], [], []
        for ids, seed in zip(prompt_ids, seeds, strict=True):
            draw = random.Random(step_seed(seed, *ids))
            tokens = self._completion(draw, sampling)
            ended = tokens[-1] in sampling.stop_token_ids
            completions.append(tokens)
            reasons.append("stop" if ended else "length")
            logps.append([-draw.uniform(0.1, 3.0) for _ in tokens])
        # as from an engine: the shortest are there first
        for i in sorted(range(len(seeds)), key=lambda i: len(completions[i])):
            on_finished(i, completions[i])
        return Rollout(completions, reasons, logps if self.logps else None)

    def _completion(self, draw: random.Random, sampling: Sampling) -> list[int]:
        most, stops = sampling.max_new_tokens, sampling.stop_token_ids
        words = [token for token in range(3, self.vocab_size) if token not in stops]
        length = draw.randint(1, most) if stops else most
        tokens = draw.choices(words, k=length)
        if length < most:
            tokens[-1] = draw.choice(stops)
        return tokens
