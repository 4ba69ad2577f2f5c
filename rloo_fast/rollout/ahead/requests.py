"""What an engine offers whose completions are asked for one by one, also while weights are loaded.

A subclass writes `_complete`, and `_load`, which may run while completions are under way.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

from ...records import RawPrompt, Rollout, Sampling
from ..engine import EngineError, OnFinished, RolloutEngine
from .flight import Sampled


class RequestEngine(RolloutEngine):
    """An engine of its own memory that any thread may ask for a completion at any time.

    `most_requests`: open requests of a call of `generate`.
    """

    most_requests = 256

    def begin(self) -> None:
        """Requests may come, also after `hang_up`."""
        return

    def prepare(self, sampling: Sampling, longest: int) -> Any:
        """What requests with this sampling have in common, checked once: prompts of at most
        `longest` tokens."""
        return sampling

    @abstractmethod
    def complete(self, prompt_ids: list[int], seed: int, prepared: Any) -> Sampled:
        """One completion, with the version of the weights that sampled each of its tokens. Raises
        EngineError once no completion can be had any more."""

    def complete_raw(
        self, prompt_ids: list[int], raw: RawPrompt, seed: int, prepared: Any
    ) -> Sampled:
        """The same of a prompt with images, where it `reads_images`."""
        raise EngineError(f"{type(self).__name__} reads no images.")

    def hang_up(self) -> None:
        """Abort every open request: its caller gets an EngineError."""
        return

    def _generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished,
    ) -> Rollout:
        prepared = self._prepared_for(prompt_ids, sampling)
        rows = list(zip(prompt_ids, seeds, prepared, strict=True))
        return self._asked([partial(self.complete, *row) for row in rows], on_finished)

    def _generate_raw(
        self,
        prompt_ids: list[list[int]],
        raw: Sequence[RawPrompt],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished,
    ) -> Rollout:
        prepared = self._prepared_for(prompt_ids, sampling)
        rows = list(zip(prompt_ids, raw, seeds, prepared, strict=True))
        return self._asked([partial(self.complete_raw, *row) for row in rows], on_finished)

    def _prepared_for(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Any]:
        """For each prompt: max_length may leave one less room than another."""
        if sampling.max_length is None:
            longest = max(map(len, prompt_ids), default=0)
            return [self.prepare(sampling, longest)] * len(prompt_ids)
        return [self.prepare(sampling.behind(len(ids)), len(ids)) for ids in prompt_ids]

    def _asked(self, requests: list[Callable[[], Sampled]], on_finished: OnFinished) -> Rollout:
        self.begin()
        done: dict[int, Sampled] = {}
        pool = ThreadPoolExecutor(self.most_requests)
        try:
            asked = {pool.submit(request): index for index, request in enumerate(requests)}
            for future in as_completed(asked):
                index = asked[future]
                done[index] = future.result()
                on_finished(index, done[index].ids)
        except BaseException:  # also Ctrl-C: nobody waits for the others any more
            pool.shutdown(wait=False, cancel_futures=True)
            self.hang_up()
            raise
        finally:
            pool.shutdown(wait=False)
        return rollout_of([done[index] for index in range(len(requests))])


def rollout_of(rows: Sequence[Sampled], *, with_versions: bool = False) -> Rollout:
    """These completions, or trajectories, as what an engine returns."""
    logps = [row.logps for row in rows]
    trajectories = [row.trajectory for row in rows if row.trajectory is not None]
    newest = [row.versions[-1] for row in rows if row.versions]
    return Rollout(
        [row.ids for row in rows],
        [row.finish_reason for row in rows],
        None if None in logps else [row for row in logps if row is not None],
        weights_version=max(newest, default=None) if with_versions else None,
        token_versions=[row.versions for row in rows] if with_versions else None,
        trajectories=trajectories or None,
    )


def sampled_of(rollout: Rollout) -> list[Sampled]:
    """The inverse, of a rollout whose weights are known."""
    versions = rollout.token_versions
    if versions is None:
        assert rollout.weights_version is not None
        versions = [[rollout.weights_version] * count for count in rollout.num_sampled]
    nothing: list[Any] = [None] * len(versions)
    return [
        Sampled(*row)
        for row in zip(
            rollout.completion_ids,
            rollout.finish_reasons,
            rollout.logps or nothing,
            versions,
            rollout.trajectories or nothing,
            strict=True,
        )
    ]
