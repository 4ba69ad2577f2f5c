"""Reward functions, and all the rewards of a run. B completions, F reward functions or models.

The contract is that of TRL 1.16, with every breach an error:

    function(prompts=, completions=, completion_ids=, trainer_state=, log_extra=, log_metric=,
             **columns) -> B floats, None where the function does not apply to a completion

In a run with environments (rloo_fast/tools) it is also given environments=, those of the B
trajectories.
A function is called with whole groups, all completions of a prompt that this process samples. With
overlap_rewards (the default with vLLM) that may be several times per step: as soon as some groups
are finished, in a thread, while others are still being sampled; without, once, on all completions
of the step that this process samples. With reward_processes=N the functions that are not async run
in N other processes, one group per call; what they get and give is pickled, and so are they.
`log_extra` takes one value per completion of the call, `log_metric` any number of values, which are
averaged.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..verifiers import close_verifiers
from .batch import Batch, Decode
from .calls import Caller
from .files import innermost
from .models import RewardModel
from .over_limit import END_THE_RUN, OverLimit
from .overlap import Scoring
from .processes import Pool

FIXED_KEYWORDS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)
NOT_PASSED = ("prompt", "completion", "completion_ids")  # dataset columns kept from the functions
ENVIRONMENTS = "environments"  # like a column, in a run that has some

_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class RewardFunction:
    """A callable with its metric name, whether it is async, and the keywords it takes.

    Raises ValueError if it cannot take the keywords that every reward function is called with.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        inner = innermost(function)
        self.function = function
        self.name: str = getattr(inner, "__name__", type(inner).__name__)
        self.is_async = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(
            type(inner).__call__
        )
        # async functions share an event loop here; some have processes of their own
        self.in_workers = not self.is_async and not getattr(inner, "has_own_processes", False)
        try:
            self._parameters = list(inspect.signature(function).parameters.values())
        except (ValueError, TypeError):  # some C callables have none: a wrong call will tell
            self._parameters = [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
        self._check_takes(FIXED_KEYWORDS)

    def check_columns(self, columns: Sequence[str]) -> None:
        """ValueError if the function needs a column that is not there, or cannot take one."""
        if twice := sorted({*columns} & {*getattr(self.function, "keywords", ())}):
            raise ValueError(
                f"Reward function {self.name!r} is given {_code(twice)} twice, as an argument and "
                "as a dataset column: rename the column."
            )
        passed = {*FIXED_KEYWORDS, *columns}
        self._check_takes(passed)
        needed = [p for p in self._parameters if p.kind in _BY_KEYWORD and p.default is p.empty]
        if absent := [p.name for p in needed if p.name not in passed]:
            raise ValueError(
                f"Reward function {self.name!r} needs {_code(absent)}, but the dataset has no such "
                f"column; it has {_code(sorted(columns)) or 'none besides the prompt'}. What is no "
                "column is given in reward_kwargs."
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


def check_weights(weights: Sequence[float] | None, num_functions: int) -> list[float]:
    """One weight per reward function, each 1 where None are given. Raises ValueError."""
    if not num_functions:
        raise ValueError("At least one reward function is needed, got none.")
    weights = [1.0] * num_functions if weights is None else list(weights)
    if len(weights) != num_functions:
        raise ValueError(
            f"Number of reward weights ({len(weights)}) must match number of reward functions "
            f"({num_functions}): reward_weights has one for each."
        )
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"Reward weights must be finite, got {weights}.")
    return weights


def check_columns(functions: Iterable[Any], columns: Iterable[str]) -> None:
    """ValueError if these dataset columns do not suit the RewardFunctions among `functions`."""
    columns = [name for name in columns if name not in NOT_PASSED]
    if clash := sorted(set(columns) & set(FIXED_KEYWORDS)):
        raise ValueError(
            f"The dataset columns {_code(clash)} have the names of keywords that reward "
            "functions get from the trainer; rename them."
        )
    for function in functions:
        if isinstance(function, RewardFunction):
            function.check_columns(columns)


class Rewards:
    """The reward functions and reward models of a run: B completions -> (B, F) rewards.

    Async functions run at the same time as each other, on one event loop thread, while the
    synchronous ones run in order, or in `processes` other processes. A call may take `timeout_s`;
    `over_limit`: what becomes of completions that take longer, see OverLimit. Raises ValueError if
    it asks for more than a function's place allows.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction | RewardModel],
        weights: Sequence[float],
        timeout_s: float | None = None,
        processes: int = 0,
        over_limit: float | str | None = END_THE_RUN,
    ) -> None:
        self.functions = list(functions)
        self.weights = torch.tensor(weights, dtype=torch.float32)
        for function, name in zip(functions, _unique([f.name for f in functions]), strict=True):
            function.name = name
        self._caller = Caller(timeout_s)
        self._pool: Pool | None = None
        self._over_limit = OverLimit(over_limit)
        own = [f for f in functions if isinstance(f, RewardFunction) and f.in_workers]
        if processes:
            self._pool = Pool({f.name: f.function for f in own}, processes, timeout_s)
        elif own and not self._over_limit.ends_the_run:
            raise ValueError(
                f"reward_over_limit={over_limit!r} needs reward_processes >= 1: in the trainer's "
                f"own process, {_code(f.name for f in own)} cannot be ended. To end the run at a "
                "limit, leave reward_over_limit out."
            )

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

    @property
    def offloaded(self) -> bool:
        """Whether some reward model takes memory of the device only while it is run."""
        return any(isinstance(f, RewardModel) and f.parked is not None for f in self.functions)

    def to(self, device: torch.device | str) -> Rewards:
        """Move the reward models."""
        for model in self.models:
            model.to(device)
        return self

    def place(self, device: torch.device, *, offload: bool) -> None:
        """Put the reward models on `device`; with `offload` they wait on the host between uses."""
        for function in self.functions:
            if isinstance(function, RewardModel) and offload:
                function.park(device)
        if not offload:
            self.to(device)

    def check_columns(self, columns: Iterable[str]) -> None:
        """ValueError if these dataset columns do not suit the functions; before anything runs."""
        check_columns(self.functions, columns)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, Sequence[Any]],
        *,
        ended: Sequence[bool] | None = None,
        trainer_state: Any = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> Tensor:
        """-> (B, F) float32 on the CPU, unweighted; NaN where a function returned None. One call of
        each function. `ended`: for models that read at EOS, see RewardModel.

        Raises RewardError if a function fails, RewardTimeout if one takes longer than `timeout_s`,
        ValueError for what it returned (wrong length, not numbers, NaN, inf) or for its columns.
        """
        lengths = {"completions": len(completions), "completion_ids": len(completion_ids)}
        if wrong := {k: n for k, n in lengths.items() if n != len(prompts)}:
            raise ValueError(f"{len(prompts)} prompts, but other lengths: {wrong}.")
        together = [list(range(len(prompts)))]
        scoring = self.begin(
            prompts,
            columns,
            together,
            decode=lambda rows, _: [completions[row] for row in rows],
            trainer_state=trainer_state,
        )
        with scoring:
            return scoring.end(completion_ids, ended, log_extra, log_metric)

    def begin(
        self,
        prompts: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        groups: Sequence[list[int]],
        *,
        decode: Decode,
        trainer_state: Any = None,
    ) -> Scoring:
        """Start to compute rewards while completions are still being sampled: see Scoring.

        `groups`: rows that are scored together, every row once. `decode(rows, completion_ids)`: the
        completions of these rows as the functions get them; called in one thread at a time.
        """
        columns = {k: v for k, v in columns.items() if k not in NOT_PASSED}
        lengths = {f"column {k!r}": len(v) for k, v in columns.items()}
        if wrong := {k: n for k, n in lengths.items() if n != len(prompts)}:
            raise ValueError(f"{len(prompts)} prompts, but other lengths: {wrong}.")
        self.check_columns(columns)
        batch = Batch(prompts, columns, decode, len(self.functions))
        return Scoring(
            self.functions,
            batch,
            groups,
            trainer_state,
            self._caller,
            self._pool,
            self._over_limit,
        )

    def combine(self, rewards: Tensor) -> Tensor:  # (B, F) -> (B,)
        """R_i = sum over f of w_f r_if, leaving out NaN; NaN where every r_if is NaN."""
        if rewards.ndim != 2 or rewards.shape[1] != len(self.functions):
            raise ValueError(
                f"Expected rewards of shape (B, {len(self.functions)}), got {tuple(rewards.shape)}."
            )
        total = (rewards * self.weights.to(rewards.device)).nansum(dim=1)
        return total.masked_fill(rewards.isnan().all(dim=1), math.nan)

    def close(self) -> None:
        """End the event loop's thread and the processes, those of verifiers as well. A later call
        starts them again."""
        self._caller.close()
        close_verifiers()
        if self._pool is not None:
            self._pool.close()


def _unique(names: list[str]) -> list[str]:
    taken: list[str] = []
    for name in names:
        numbered = (name if n == 1 else f"{name}_{n}" for n in range(1, len(names) + 1))
        taken.append(next(n for n in numbered if n not in taken))
    return taken


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
