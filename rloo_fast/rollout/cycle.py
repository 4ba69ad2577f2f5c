"""One rollout in order: free GPU memory, wake the weights, sync them, wake the KV cache, generate,
sleep, and move the trainer's state back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..offload.engine_room import EngineRoom
from ..records import Bucket, ImageInputs, RawPrompt, Rollout, Sampling
from .engine import EngineState, OnFinished, RolloutEngine

OnSync = Callable[[str, float, int], None]  # (mode, seconds that a sync took, bytes sent)


class RolloutCycle:
    """Loads the policy's weights into `engine` before it samples, and puts it to sleep afterwards.

    `version()`: that of the policy's weights now. `weights()`: a new stream of them, in bounded
    buckets. `sleep_level`: 0 keeps everything in memory between rollouts, 2 drops weights and KV
    cache. `room`: moves the trainer's state to the host while the engine is awake; None: it stays.
    `on_sync(mode, seconds, num_bytes)` is called after every sync of an engine that holds its own
    copy of the weights; `mode` is what `generate` was given.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        version: Callable[[], int],
        weights: Callable[[], Iterable[Bucket]],
        *,
        sleep_level: int = 0,
        room: EngineRoom | None = None,
        on_sync: OnSync | None = None,
    ):
        self.engine, self.version, self.weights = engine, version, weights
        self.sleep_level, self.room, self.on_sync = sleep_level, room, on_sync

    def generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished | None = None,
        *,
        mode: str = "train",
        inputs: Sequence[ImageInputs] | None = None,
        raw: Sequence[RawPrompt] | None = None,
    ) -> Rollout:
        """RolloutEngine.generate from the policy's weights as they are now."""
        version = self.version()
        self._make_ready(version, mode)
        more: dict[str, Any] = {"inputs": inputs} if raw is None else {"raw": raw}
        if inputs is None:
            more = {}  # engines may be anyone's
        return self.engine.generate(
            prompt_ids, sampling, seeds, version=version, on_finished=on_finished, **more
        )

    def sleep(self, *, give_back: bool = True) -> None:
        """Put the engine to sleep, and move the trainer's state back to the GPU.

        Call it before the trainer needs the memory; an engine that sleeps already stays asleep.
        give_back=False: the trainer's state stays on the host until the next call.
        """
        if self.engine.state in (EngineState.READY, EngineState.SYNCED):
            self.engine.sleep(self.sleep_level)
        if give_back and self.engine.state is EngineState.ASLEEP:
            self._give_back()

    def close(self) -> None:
        """Close the engine for good, and move the trainer's state back."""
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
        if self.on_sync is not None:
            self.on_sync(mode, time.perf_counter() - start, sent)
