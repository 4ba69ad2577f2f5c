"""What a rollout engine offers the trainer, and the order in which it may be asked.

    ASLEEP -- wake("weights") --> WEIGHTS_AWAKE -- load_weights(v) --> SYNCED
    SYNCED -- wake("kv_cache") --> READY -- generate(version=v) --> READY -- sleep --> ASLEEP

An engine that slept at a level below 2 still has its weights: wake("weights") then leads to SYNCED.
Any other order raises, and so does `generate` for a version that was not loaded last.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from enum import Enum

from torch import Tensor

from ..config import RLOOConfig, as_dict
from ..types import Rollout, Sampling

Bucket = list[tuple[str, Tensor]]  # (name as in a checkpoint, full tensor); at least one
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
    """Samples completions from weights whose version it knows. Subclasses fill the `_` methods."""

    shares_weights = False  # it samples with the trainer's own parameters: nothing is sent

    def __init__(self) -> None:
        self.state = EngineState.ASLEEP
        self.version: int | None = None  # of the weights it holds; None: not those of a policy

    def wake(self, tags: Sequence[str]) -> None:
        """("weights",) and later ("kv_cache",): memory for them comes back."""
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
        """Replace every weight by those of policy `version`; raises if one is not covered."""
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
    ) -> Rollout:
        """One completion per prompt, in order, sampled by policy `version`.

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
        rollout = self._generate(prompt_ids, sampling, seeds, on_finished or _ignore)
        rollout.weights_version = version
        return rollout

    def sleep(self, level: int) -> None:
        """Give memory back. 0: keep all; 1: weights to the host, no KV cache; 2: drop both."""
        if level not in (0, 1, 2):
            raise ValueError(f"sleep levels are 0, 1 and 2, got {level}.")
        self._require(EngineState.READY, EngineState.SYNCED, doing="sleep")
        self._sleep(level)
        self.state = EngineState.ASLEEP
        if level == 2:
            self.version = None

    def close(self) -> None:
        """Give everything back; may be called in any state, and twice."""
        if self.state is not EngineState.CLOSED:
            self.state, self.version = EngineState.CLOSED, None
            self._close()

    def _require(self, *states: EngineState, doing: str) -> None:
        if self.state not in states:
            expected = " or ".join(repr(state.value) for state in states)
            raise EngineError(
                f"{doing}: the rollout engine must be {expected}, but it is {self.state.value!r}."
            )

    # What an engine fills in; those that hold no memory of their own leave out the first three

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


def _ignore(index: int, completion_ids: list[int]) -> None:
    return


def step_seed(seed: int, *keys: int) -> int:
    """A 63-bit seed from the run's seed and where in the run a draw stands; the same everywhere."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def sampling_of(args: RLOOConfig, stop_token_ids: tuple[int, ...]) -> Sampling:
    """How a configuration wants its completions drawn."""
    extra = as_dict(args.generation_kwargs)
    if args.cache_implementation is not None:
        extra.setdefault("cache_implementation", args.cache_implementation)
    return Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k or 0,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        max_new_tokens=args.max_completion_length,
        stop_token_ids=stop_token_ids,
        extra=extra,
    )
