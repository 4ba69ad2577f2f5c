"""The cycle of an engine that samples while the policy is trained: it never sleeps."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from ...records import RawPrompt, Rollout, Sampling
from ..cycle import RolloutCycle


class SharedCycle(RolloutCycle):
    """Weights are loaded when they are asked for, and calls of the engine take turns: one may come
    from a thread that samples ahead, another from the trainer's."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        assert not self.sleep_level
        assert self.room is None
        self._turn = threading.RLock()

    def synchronize(self) -> None:
        """Bring the policy's weights as they are now into the engine."""
        with self._turn:
            self._make_ready(self.version(), "train")

    def generate(self, *args: Any, **options: Any) -> Rollout:
        with self._turn:
            return super().generate(*args, **options)

    def generate_as_loaded(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        raw: Sequence[RawPrompt | None],
    ) -> Rollout:
        """From the weights that the engine holds, whatever the policy's are by now. `raw`: all of
        them in a run with images."""
        given = [one for one in raw if one is not None]
        more: dict[str, Any] = {"raw": given} if given else {}  # engines may be anyone's
        with self._turn:
            version = self.engine.version
            assert version is not None, "it was asked before the first weights"
            return self.engine.generate(prompt_ids, sampling, seeds, version=version, **more)

    def sleep(self, *, give_back: bool = True) -> None:
        return

    def _make_ready(self, version: int, mode: str) -> None:
        if self.engine.version != version:
            super().sleep()  # at level 0, which frees nothing: weights come after it
        super()._make_ready(version, mode)
