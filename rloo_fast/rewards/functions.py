"""Reward functions, and all the rewards of a run. B completions, F reward functions or models.

The contract is that of TRL 1.16, with every breach an error:

    function(prompts=, completions=, completion_ids=, trainer_state=, log_extra=, log_metric=,
             **columns) -> B floats, None where the function does not apply to a completion
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rloo_fast.rewards.builtin import describe_sample
from rloo_fast.rewards.calls import Caller, failed, one_at_a_time
from rloo_fast.rewards.models import RewardModel
from rloo_fast.rewards.values import read_values

logger = logging.getLogger(__name__)

FIXED_KEYWORDS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)
NOT_PASSED = ("prompt", "completion", "completion_ids")  # dataset columns kept from the functions

_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class RewardFunction:
    """A callable with its metric name, whether it is async, and the keywords it takes.

    Raises ValueError if it cannot take the keywords that every reward function is called with.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        inner: Any = function
        while isinstance(inner, functools.partial):
            inner = inner.func
        self.function = function
        self.name: str = getattr(inner, "__name__", type(inner).__name__)
        self.is_async = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(
            type(inner).__call__
        )
        try:
            self._parameters = list(inspect.signature(function).parameters.values())
        except (ValueError, TypeError):  # some C callables have none: a wrong call will tell
            self._parameters = [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
        self._check_takes(FIXED_KEYWORDS)

    def check_columns(self, columns: Sequence[str]) -> None:
        """ValueError if the function needs a column that is not there, or cannot take one."""
        passed = {*FIXED_KEYWORDS, *columns}
        self._check_takes(passed)
        needed = [p for p in self._parameters if p.kind in _BY_KEYWORD and p.default is p.empty]
        if absent := [p.name for p in needed if p.name not in passed]:
            raise ValueError(
                f"Reward function {self.name!r} needs {_code(absent)}, but the dataset has no such "
                f"column; it has {_code(sorted(columns)) or 'none besides the prompt'}."
            )

    def _check_takes(self, keywords: Iterable[str]) -> None:
        parameters = self._parameters
        if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
            raise ValueError(
                f"Reward function {self.name!r} has positional-only parameters, but is called with "
                "keywords only. Remove the `/` from its signature."
            )
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return
        taken = {p.name for p in parameters if p.kind in _BY_KEYWORD}
        if refused := sorted(set(keywords) - taken):
            start = "async def" if self.is_async else "def"
            rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
            raise ValueError(
                f"Reward function {self.name!r} is also called with {_code(refused)}, which it "
                f"does not take. Write: {start} {self.name}"
                f"{inspect.Signature([*parameters, rest])}"
            )


class Rewards:
    """The reward functions and reward models of a run: B completions -> (B, F) rewards.

    Async functions run at the same time as each other, on one event loop thread, while the
    synchronous ones and the models run in order. `log_extra` and `log_metric` are called by one
    function at a time.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction | RewardModel],
        weights: Sequence[float] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if not functions:
            raise ValueError("At least one reward function is needed, got none.")
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions):
            raise ValueError(
                f"One weight per reward function is needed: got {len(weights)} weights for "
                f"{len(functions)} functions."
            )
        if not all(math.isfinite(w) for w in weights):
            raise ValueError(f"Reward weights must be finite, got {weights}.")
        self.functions = list(functions)
        self.weights = torch.tensor(weights, dtype=torch.float32)
        for function, name in zip(functions, _unique([f.name for f in functions]), strict=True):
            function.name = name
        self._caller = Caller(timeout_s)

    @property
    def names(self) -> list[str]:
        """Metric names, in order: `name`, `name_2`, ... where several share a name."""
        return [f.name for f in self.functions]

    @property
    def models(self) -> list[nn.Module]:
        """The reward models, in order; assign a list of the same length to replace (wrap) them."""
        return [f.model for f in self.functions if isinstance(f, RewardModel)]

    @models.setter
    def models(self, models: Sequence[nn.Module]) -> None:
        holders = [f for f in self.functions if isinstance(f, RewardModel)]
        for holder, model in zip(holders, models, strict=True):
            holder.model = model

    def to(self, device: torch.device | str) -> Rewards:
        """Move the reward models."""
        for model in self.models:
            model.to(device)
        return self

    def check_columns(self, columns: Iterable[str]) -> None:
        """ValueError if these dataset columns do not suit the functions; before anything runs."""
        columns = [name for name in columns if name not in NOT_PASSED]
        if clash := sorted(set(columns) & set(FIXED_KEYWORDS)):
            raise ValueError(
                f"The dataset columns {_code(clash)} have the names of keywords that reward "
                "functions get from the trainer; rename them."
            )
        for function in self.functions:
            if isinstance(function, RewardFunction):
                function.check_columns(columns)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        *,
        trainer_state: Any = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> Tensor:
        """-> (B, F) float32 on the CPU, unweighted; NaN where a function returned None.

        Raises RewardError if a function fails, RewardTimeout if one takes longer than `timeout_s`,
        ValueError for what it returned (wrong length, not numbers, NaN, inf) or for its columns.
        """
        columns = {k: v for k, v in columns.items() if k not in NOT_PASSED}
        lengths = {"completions": len(completions), "completion_ids": len(completion_ids)}
        lengths |= {f"column {k!r}": len(v) for k, v in columns.items()}
        if wrong := {k: n for k, n in lengths.items() if n != len(prompts)}:
            raise ValueError(f"{len(prompts)} prompts, but other lengths: {wrong}.")
        self.check_columns(columns)
        lock = threading.Lock()
        keywords = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            "trainer_state": trainer_state,
            "log_extra": one_at_a_time(log_extra, lock),
            "log_metric": one_at_a_time(log_metric, lock),
            **columns,
        }
        by_name = self._run(keywords)
        rewards = torch.stack([by_name[name] for name in self.names], dim=1)
        if unscored := rewards.isnan().all(dim=1).nonzero().flatten().tolist():
            logger.warning(
                "Every reward function returned None for %d of %d completions, which therefore do "
                "not count. The first: %s.",
                len(unscored),
                len(prompts),
                describe_sample(unscored[0], prompts, completions),
            )
        return rewards

    def combine(self, rewards: Tensor) -> Tensor:  # (B, F) -> (B,)
        """R_i = sum over f of w_f r_if, leaving out NaN; NaN where every r_if is NaN."""
        if rewards.ndim != 2 or rewards.shape[1] != len(self.functions):
            raise ValueError(
                f"Expected rewards of shape (B, {len(self.functions)}), got {tuple(rewards.shape)}."
            )
        total = (rewards * self.weights.to(rewards.device)).nansum(dim=1)
        return total.masked_fill(rewards.isnan().all(dim=1), math.nan)

    def close(self) -> None:
        """Stop the event loop thread. A later call starts it again."""
        self._caller.close()

    def _run(self, keywords: dict[str, Any]) -> dict[str, Tensor]:
        """Function name -> (B,) values."""
        prompts, completions = keywords["prompts"], keywords["completions"]
        functions = [f for f in self.functions if isinstance(f, RewardFunction)]
        done: dict[str, Tensor] = {}
        started = time.monotonic()
        running = {
            f.name: self._caller.start(f.function, f.name, keywords)
            for f in functions
            if f.is_async
        }
        try:
            for f in self.functions:
                if isinstance(f, RewardModel):
                    values = _call_model(f, prompts, completions)
                elif f.is_async:
                    continue
                else:
                    values = self._caller.call(f.function, f.name, keywords)
                done[f.name] = read_values(values, f.name, prompts, completions)
            for name in running:
                values = self._caller.wait(name, running, started)
                done[name] = read_values(values, name, prompts, completions)
        finally:
            for future in running.values():
                future.cancel()  # those that still run, if another has failed
        return done


def _call_model(model: RewardModel, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
    try:
        return model(prompts, completions)
    except ValueError as error:
        error.add_note(f"(in the reward model {model.name!r})")
        raise
    except Exception as error:
        raise failed(model.name, error) from error


def _unique(names: list[str]) -> list[str]:
    taken: list[str] = []
    for name in names:
        numbered = (name if n == 1 else f"{name}_{n}" for n in range(1, len(names) + 1))
        taken.append(next(n for n in numbered if n not in taken))
    return taken


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
