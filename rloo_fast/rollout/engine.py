"""What every rollout engine offers the trainer, and the order of calls that it accepts.

    ASLEEP -- wake("weights") --> WEIGHTS_AWAKE -- load_weights(v) --> SYNCED
    SYNCED -- wake("kv_cache") --> READY -- generate(version=v) --> READY -- sleep --> ASLEEP

An engine that slept at a level below 2 still has its weights: wake("weights") then leads to SYNCED.
Any other order raises, and so does `generate` for a version that was not loaded last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import Enum
from itertools import groupby
from typing import Self

from ..records import Bucket, ImageInputs, RawPrompt, Rollout, Sampling, SentParts
from .settings import EngineSettings

OnFinished = Callable[[int, list[int]], None]  # (index of the prompt, completion ids)


class EngineState(Enum):
    ASLEEP = "asleep"
    WEIGHTS_AWAKE = "awake, its weights not loaded"
    SYNCED = "synced, its KV cache asleep"
    READY = "ready"
    CLOSED = "closed"


class EngineError(RuntimeError):
    """The engine died, ran out of memory or was asked out of order; the message says what to do."""


class StaleWeights(EngineError):
    """Completions were asked of weights that the engine does not hold."""


class RolloutEngine(ABC):
    """Samples completions from weights whose version it knows.

    A subclass writes `_generate` and `_load`, and where it holds memory or needs settings, the
    others below them; `registry.py` makes it known by a name.
    """

    shares_weights = False  # it samples with the trainer's own parameters: nothing is sent
    sleeps_in_process = False  # its memory is on the training processes' own GPUs
    reads_vllm_settings = False  # use_vllm and vllm_* mean something to it
    takes_images = False  # it has a `_generate_with_images`
    reads_images = False  # it has a `_generate_raw`, and a processor of its own

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> Self:
        """The engine of a run. Raises ValueError or ImportError where it cannot serve the model."""
        return cls()

    def __init__(self) -> None:
        self.state = EngineState.ASLEEP
        self.version: int | None = None  # of the weights it holds; None: not those of a policy

    @property
    def wanted(self) -> SentParts:
        """What the next `load_weights` must bring."""
        return "merged"

    def wake(self, tags: Sequence[str]) -> None:
        """Allocate memory for the "weights", and once those are loaded for the "kv_cache"."""
        for tag in tags:
            if tag == "weights":
                self._require(EngineState.ASLEEP, doing='wake("weights")')
                self._wake(tag)
                kept = self.version is not None
                self.state = EngineState.SYNCED if kept else EngineState.WEIGHTS_AWAKE
            elif tag == "kv_cache":
                self._require(EngineState.SYNCED, doing='wake("kv_cache")')
                self._wake(tag)
                self.state = EngineState.READY
            else:
                raise ValueError(f"wake knows the tags 'weights' and 'kv_cache', got {tag!r}.")

    def load_weights(self, version: int, buckets: Iterable[Bucket]) -> None:
        """Replace every weight by those of policy `version`, or with them the parts that are
        `wanted`; raises if one is not covered."""
        self._require(EngineState.WEIGHTS_AWAKE, EngineState.SYNCED, doing="load_weights")
        self.state, self.version = EngineState.WEIGHTS_AWAKE, None  # until all of them are there
        self._load(version, buckets)
        self.state, self.version = EngineState.SYNCED, version

    def generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        version: int,
        on_finished: OnFinished | None = None,
        inputs: Sequence[ImageInputs] | None = None,
        raw: Sequence[RawPrompt] | None = None,
    ) -> Rollout:
        """One completion per prompt, in order, sampled by policy `version`; `inputs`: what the
        prompts bring beside their ids, in a run with images, `raw`: the same for `reads_images`.

        The completion of prompt i follows from its ids and seeds[i], whatever stands beside it (to
        rounding). `on_finished(i, ids)` is called for each as soon as the engine has it. The global
        random state stays as it was. Raises StaleWeights if the engine holds another version.
        """
        self._require(EngineState.READY, doing="generate")
        if self.version != version:
            raise StaleWeights(
                f"the engine holds weights {self.version}, the policy is at {version}: load them "
                "before generating."
            )
        if len(seeds) != len(prompt_ids):
            raise ValueError(f"{len(prompt_ids)} prompts need as many seeds, got {len(seeds)}.")
        heard = on_finished or _ignore
        if raw is not None:
            rollout = self._generate_raw(prompt_ids, raw, sampling, seeds, heard)
        elif inputs is None:
            rollout = self._generate(prompt_ids, sampling, seeds, heard)
        else:
            rollout = self._generate_with_images(prompt_ids, inputs, sampling, seeds, heard)
        _check(rollout, len(prompt_ids), version)
        return replace(rollout, weights_version=version)

    def sleep(self, level: int) -> None:
        """Free memory. Level 0: none; 1: weights to the host, drop the KV cache; 2: drop both."""
        if level not in (0, 1, 2):
            raise ValueError(f"sleep levels are 0, 1 and 2, got {level}.")
        self._require(EngineState.READY, EngineState.SYNCED, doing="sleep")
        self._sleep(level)
        self.state = EngineState.ASLEEP
        if level == 2:
            self.version = None

    def close(self) -> None:
        """Free everything, for good; may be called in any state, and twice."""
        if self.state is not EngineState.CLOSED:
            self.state, self.version = EngineState.CLOSED, None
            self._close()

    def _require(self, *states: EngineState, doing: str) -> None:
        if self.state not in states:
            expected = " or ".join(repr(state.value) for state in states)
            raise EngineError(
                f"{doing}: the rollout engine must be {expected}, but it is {self.state.value!r}."
            )

    # What a subclass writes; one that holds no memory of its own leaves out the first three

    def _wake(self, tag: str) -> None:
        return

    def _sleep(self, level: int) -> None:
        return

    def _close(self) -> None:
        return

    @abstractmethod
    def _load(self, version: int, buckets: Iterable[Bucket]) -> None: ...

    @abstractmethod
    def _generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished,
    ) -> Rollout: ...

    def _generate_with_images(
        self,
        prompt_ids: list[list[int]],
        inputs: Sequence[ImageInputs],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished,
    ) -> Rollout:
        raise EngineError(f"{type(self).__name__} takes no images.")

    def _generate_raw(
        self,
        prompt_ids: list[list[int]],
        raw: Sequence[RawPrompt],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished,
    ) -> Rollout:
        """The completions follow `prompt_ids`, which is what `raw` must become."""
        raise EngineError(f"{type(self).__name__} reads no images.")


def _check(rollout: Rollout, count: int, version: int) -> None:
    """EngineError for a rollout that is not what `Rollout` says: engines may be a user's own."""
    ids, reasons, logps = rollout.completion_ids, rollout.finish_reasons, rollout.logps
    lengths = {len(ids), len(reasons), len(ids if logps is None else logps)}
    if lengths != {count}:
        raise EngineError(
            f"the rollout engine was given {count} prompts and returned {len(ids)} completions, "
            f"{len(reasons)} finish_reasons"
            + ("." if logps is None else f" and log-probs of {len(logps)}.")
        )
    if unknown := sorted(set(map(str, reasons)) - {"stop", "length"}):
        raise EngineError(
            f"the rollout engine returned finish_reasons {unknown}: 'stop' is expected where a "
            "stop token or a stop string ended the completion, 'length' where it was cut."
        )
    for row, values in zip(ids, logps or [], strict=logps is not None):
        if len(row) != len(values):
            raise EngineError(
                f"the rollout engine returned {len(values)} log-probs for a completion of "
                f"{len(row)} tokens: one per token, or logps=None."
            )
    if rollout.token_versions is not None:
        check_versions(rollout.token_versions, ids, version)


def check_versions(
    token_versions: list[list[int]], completion_ids: list[list[int]], newest: int
) -> None:
    """EngineError unless every token has the version that drew it: within a completion they never
    fall, and none is beyond `newest`."""
    shapes = [[len(row) for row in rows] for rows in (token_versions, completion_ids)]
    if shapes[0] != shapes[1]:
        raise EngineError(
            "the rollout engine returned token_versions of another shape than the completions': "
            "one per token, or token_versions=None."
        )
    for i, row in enumerate(token_versions):
        if row and (sorted(row) != row or row[-1] > newest):
            raise EngineError(
                f"the rollout engine returned that versions {[v for v, _ in groupby(row)]} of the "
                f"weights drew the tokens of completion {i}: expected were versions that never "
                f"fall, up to {newest}."
            )


def _ignore(index: int, completion_ids: list[int]) -> None:
    return
