"""An engine that samples from a copy of the policy, in threads, while the policy is trained.

As from a server: a completion under way goes on with new weights, which read again what it has so
far, and each token is labelled with the version that sampled it. `stall_s`: of every completion,
before its first token.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import nn

from rloo_fast.records import Bucket, RawPrompt, Rollout, Sampling
from rloo_fast.rollout.ahead import RequestEngine, Sampled
from rloo_fast.rollout.engine import EngineError, OnFinished, RolloutEngine
from rloo_fast.rollout.settings import EngineSettings
from rloo_fast.weight_sync.buckets import checkpoint_name


class CopiedEngine(RequestEngine):
    """See the module."""

    stall_s = 0.0
    token_s = 0.0
    processor: Any = None

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> Self:
        return cls(settings.model)

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = copy.deepcopy(model).eval().requires_grad_(False)
        with torch.no_grad():
            for parameter in self.model.parameters():  # nothing of it may be sampled from
                parameter.fill_(float("nan"))
        self.names: dict[str, str] = {}  # in a checkpoint -> in the model, where they differ
        self.loads: list[int] = []
        self.open = 0  # completions under way
        self.open_at_loads: list[int] = []
        self._held = threading.Lock()
        self._loaded = -1

    def _load(self, version: int, buckets: Iterable[Bucket]) -> None:
        with self._held, torch.no_grad():
            weights = self.model.state_dict()
            for bucket in buckets:
                for name, tensor in bucket:
                    weights[self.names.get(name, name)].copy_(tensor)
            self._loaded = version
            self.loads.append(version)
            self.open_at_loads.append(self.open)

    def complete(self, prompt_ids: list[int], seed: int, prepared: Sampling) -> Sampled:
        return self._complete(prompt_ids, {}, seed, prepared)

    def _complete(
        self, prompt_ids: list[int], inputs: dict[str, Any], seed: int, prepared: Sampling
    ) -> Sampled:
        draw = torch.Generator().manual_seed(seed)
        ids, logps, versions = list(prompt_ids), list[float](), list[int]()
        self.open += 1
        try:
            time.sleep(self.stall_s)
            while len(versions) < prepared.max_new_tokens:
                if self.state.value == "closed":
                    raise EngineError("closed")
                with self._held, torch.no_grad():
                    logits = self.model(torch.tensor([ids]), **inputs).logits[0, -1]
                    versions.append(self._loaded)
                logp = (logits.float() / prepared.temperature).log_softmax(-1)
                token = int(torch.multinomial(logp.exp(), 1, generator=draw))
                ids.append(token)
                logps.append(float(logp[token]))
                time.sleep(self.token_s)
                if token in prepared.stop_token_ids:
                    return Sampled(ids[len(prompt_ids) :], "stop", logps, versions)
            return Sampled(ids[len(prompt_ids) :], "length", logps, versions)
        finally:
            self.open -= 1


class SeeingCopiedEngine(CopiedEngine):
    """With a processor of its own, as a server has one."""

    reads_images = True

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> Self:
        engine = cls(settings.model)
        engine.processor = settings.processor
        engine.names = {checkpoint_name(engine.model, n): n for n in engine.model.state_dict()}
        return engine

    def complete_raw(
        self, prompt_ids: list[int], raw: RawPrompt, seed: int, prepared: Sampling
    ) -> Sampled:
        text, images = (
            self.processor.tokenizer.decode(raw.ids),
            [raw.images] if raw.images else None,
        )
        read = self.processor(text=[text], images=images, return_tensors="pt")
        assert read.pop("input_ids")[0].tolist() == prompt_ids
        read.pop("attention_mask")
        return self._complete(prompt_ids, read, seed, prepared)


class SlowCopiedEngine(CopiedEngine):
    """Its completions take longer than a step."""

    token_s = 0.01


class CopiedCalls(RolloutEngine):
    """An engine that answers whole calls, with weights of its own."""

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> Self:
        return cls(settings.model)

    def __init__(self, model: nn.Module):
        super().__init__()
        self.one_by_one = SlowCopiedEngine(model)
        self.calling = False

    def _load(self, version: int, buckets: Iterable[Bucket]) -> None:
        assert not self.calling, "weights come between two calls"
        self.one_by_one._load(version, buckets)

    def _generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished,
    ) -> Rollout:
        assert not self.calling, "one call at a time"
        self.calling = True
        rows = [
            self.one_by_one.complete(ids, seed, sampling)
            for ids, seed in zip(prompt_ids, seeds, strict=True)
        ]
        self.calling = False
        return Rollout(
            [row.ids for row in rows],
            [row.finish_reason for row in rows],
            [row.logps or [] for row in rows],
        )
