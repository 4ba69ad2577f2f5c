"""A rollout engine that samples from the weights of some versions ago, and says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rloo_fast.records import Bucket, Rollout
from rloo_fast.rollout.hf import HFEngine
from rloo_fast.rollout.registry import register_engine


@register_engine("lagged")
class Lagged(HFEngine):
    """transformers' engine with the weights of `lag` versions ago, of the first ones until then.

    `tells`: whose weights they were is in the rollout; otherwise they pass for the policy's own.
    """

    lag, tells = 0, True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kept: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=self.lag + 1)

    def _load(self, version: int, buckets: Iterable[Bucket]) -> None:
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.kept.append((version, weights))

    def _generate(self, *args: Any) -> Rollout:
        version, weights = self.kept[0]
        with self._in_place(weights):
            rollout = super()._generate(*args)
        if not self.tells:
            return rollout
        versions = [[version] * len(ids) for ids in rollout.completion_ids]
        return replace(rollout, token_versions=versions)

    @contextmanager
    def _in_place(self, weights: dict[str, Tensor]) -> Iterator[None]:
        named = dict(self.model.named_parameters())
        now = {name: p.detach().clone() for name, p in named.items()}
        self._put(named, weights)
        try:
            yield
        finally:
            self._put(named, now)

    def _put(self, named: dict[str, Any], weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(weights[name])
