"""The engine's day: room is made, weights wake, are synced, the KV cache wakes, completions are
sampled, the engine sleeps, and what was moved out of its way comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from ..memory import Room
from ..reports.metrics import Metrics
from ..types import Rollout, Sampling
from .engine import Bucket, EngineState, OnFinished, RolloutEngine


class RolloutCycle:
    """Keeps `engine` in step with the policy, and asleep while the policy is trained.

    `version`: of the policy's weights now. `weights`: a new stream of them, in bounded buckets.
    `sleep_level`: 0 keeps everything in memory between rollouts, 2 drops weights and KV cache.
    `room`: what the trainer moves away while the engine is awake, None: nothing.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        version: Callable[[], int],
        weights: Callable[[], Iterable[Bucket]],
        metrics: Metrics,
        *,
        sleep_level: int = 0,
        room: Room | None = None,
    ):
        self.engine, self.version, self.weights = engine, version, weights
        self.metrics, self.sleep_level, self.room = metrics, sleep_level, room

    def generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished | None = None,
        *,
        mode: str = "train",
    ) -> Rollout:
        """As RolloutEngine.generate, with the policy's weights as they are now."""
        version = self.version()
        self._make_ready(version, mode)
        return self.engine.generate(
            prompt_ids, sampling, seeds, version=version, on_finished=on_finished
        )

    def sleep(self, *, give_back: bool = True) -> None:
        """Before anything of the trainer needs the engine's memory; does nothing if it sleeps.

        Without `give_back` what was moved out of the engine's way stays away, until the next call.
        """
        if self.engine.state in (EngineState.READY, EngineState.SYNCED):
            self.engine.sleep(self.sleep_level)
        if give_back and self.engine.state is EngineState.ASLEEP:
            self._give_back()

    def close(self) -> None:
        """Give the engine's memory back for good."""
        self.engine.close()
        self._give_back()

    def _give_back(self) -> None:
        if self.room is not None and self.room.is_made:
            self.room.give_back()

    def _make_ready(self, version: int, mode: str) -> None:
        engine = self.engine
        if engine.state is EngineState.READY and engine.version == version:
            return
        self.sleep()
        if engine.state is EngineState.ASLEEP:
            if self.room is not None:
                self.room.make()
            engine.wake(("weights",))
        if engine.version != version:
            self._sync(version, mode)
        engine.wake(("kv_cache",))

    def _sync(self, version: int, mode: str) -> None:
        if self.engine.shares_weights:
            self.engine.load_weights(version, ())
            return
        sent = 0

        def counted() -> Iterable[Bucket]:
            nonlocal sent
            for bucket in self.weights():
                sent += sum(tensor.nbytes for _, tensor in bucket)
                yield bucket

        start = time.perf_counter()
        self.engine.load_weights(version, counted())
        seconds = time.perf_counter() - start
        self.metrics.add(mode, {"time/weight_sync_s": seconds, "sync/gib": sent / 2**30})
