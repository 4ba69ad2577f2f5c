"""How the completions of a process' rows are made: by the engine alone, or with tools.

A session is opened for the rows of a rollout, and closed once they are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

from accelerate import Accelerator

from ..data.tokenize import RowTokenizer
from ..distributed.collectives import gather_objects
from ..records import ImageInputs, Message, Prompt, RawPrompt, Rollout, Sampling, Trajectory
from ..rollout.ahead import Held, Sampled
from ..rollout.ahead.flight import Row
from ..rollout.ahead.requests import sampled_of
from ..rollout.cycle import RolloutCycle
from ..rollout.stops import KeptRows, Stops
from ..rollout.trajectories import Generate, Language, Limits, TrajectorySampler
from ..tools import Opened, RunTools
from ..tools.run_tools import EMPTY_PROMPT
from .rollout_func import Made, call_rollout_func

Finished = Callable[[int, list[int], int], None]  # row, its completion's ids, tokens sampled


class Session(Protocol):
    """The rows of a rollout. `texts`: of rows whose completion is not what their tokens say, as
    these are finished. `environments`: of the rows; None: they have none."""

    @property
    def rows(self) -> list[Prompt]: ...

    @property
    def texts(self) -> Mapping[int, str | list[Message]]: ...

    @property
    def environments(self) -> list[Any] | None: ...

    def sample(self, seeds: list[int], mode: str, finished: Finished) -> Rollout: ...


# rows, and the sampling as it is set now
Open = Callable[[list[Prompt], Sampling], AbstractContextManager[Session]]


class EngineSession:
    """A completion of each row, as the engine samples it and `stops` keep it."""

    environments: list[Any] | None = None

    def __init__(
        self, rows: list[Prompt], rollouts: RolloutCycle, sampling: Sampling, stops: Stops
    ):
        self.rows, self.rollouts, self.sampling = rows, rollouts, sampling
        self.kept = KeptRows(stops, [[*row.ids] for row in rows])
        self.texts: Mapping[int, str | list[Message]] = self.kept.texts

    @classmethod
    @contextmanager
    def open(
        cls, rows: list[Prompt], sampling: Sampling, *, rollouts: RolloutCycle, stops: Stops
    ) -> Iterator[EngineSession]:
        yield cls(rows, rollouts, sampling, stops)

    def sample(self, seeds: list[int], mode: str, finished: Finished) -> Rollout:
        def heard(row: int, ids: list[int]) -> None:
            finished(row, ids[: self.kept.row(row, ids).num_tokens], len(ids))

        sampled = self.rollouts.generate(
            [[*ids] for ids in self.kept.prompt_ids],  # an engine may be anyone's
            self.sampling,
            seeds,
            heard,
            mode=mode,
            inputs=inputs_of(self.rows),
            raw=raw_of(self.rows),
        )
        return self.kept.rollout(sampled)


class ToolSession:
    """A conversation of each row with its tools."""

    def __init__(
        self,
        rows: list[Prompt],
        opened: Sequence[Opened],
        rollouts: RolloutCycle,
        sampling: Sampling,
        sampler: TrajectorySampler,
    ):
        self.rows, self.tool_sets = rows, [one.tool_set for one in opened]
        self.rollouts, self.sampling, self.sampler = rollouts, sampling, sampler
        self.texts: dict[int, list[Message]] = {}
        environments = [tools.environment for tools in self.tool_sets]
        has_any = any(environment is not None for environment in environments)
        self.environments = environments if has_any else None

    def sample(self, seeds: list[int], mode: str, finished: Finished) -> Rollout:
        def heard(row: int, ids: list[int], trajectory: Trajectory) -> None:
            self.texts[row] = trajectory.messages
            finished(row, ids, trajectory.num_sampled)

        generate = partial(self.rollouts.generate, mode=mode)
        return self.sampler(generate, self.rows, self.tool_sets, self.sampling, seeds, heard)


class ToolSessions:
    """Opens sessions with the tools of a run."""

    def __init__(
        self,
        tools: RunTools,
        tokenize: RowTokenizer,
        rollouts: RolloutCycle,
        sampling: Sampling,
        stops: Stops,
        limits: Limits,
        accelerator: Accelerator,
    ):
        self.tools, self.tokenize = tools, tokenize
        self.rollouts = rollouts
        language = Language.of(
            tokenize.tokenizer, tokenize.chat_template_kwargs, sampling.stop_token_ids
        )
        self.sampler = TrajectorySampler(
            language, limits, stops, partial(gather_objects, accelerator)
        )
        self.alone = TrajectorySampler(language, limits, stops)  # of one process

    @contextmanager
    def __call__(self, rows: list[Prompt], sampling: Sampling) -> Iterator[ToolSession]:
        opened = self.tools.open([dataset_row(row) for row in rows])
        try:
            rows = self._with_texts(rows, opened)
            yield ToolSession(rows, opened, self.rollouts, sampling, self.sampler)
        finally:
            self.tools.close(one.tool_set for one in opened)

    def converse(self, rows: list[Row], generate: Generate, sampling: Sampling) -> list[Sampled]:
        """Trajectories of rows that are sampled ahead, in any thread. Whoever scores them closes
        their environments."""
        prompts = [row.group.prompt for row in rows]
        opened = self.tools.open([dataset_row(prompt) for prompt in prompts])
        tool_sets = [one.tool_set for one in opened]
        try:
            prompts = self._with_texts(prompts, opened)
            seeds = [row.group.seeds[row.sample] for row in rows]
            rollout = self.alone(generate, prompts, tool_sets, sampling, seeds)
        except BaseException:
            self.tools.close(tool_sets)
            raise
        sampled = sampled_of(rollout)
        if not self.tools.has_environments:
            return sampled
        held = [
            Held(prompt, one.environment, partial(self.tools.close, [one]))
            for prompt, one in zip(prompts, tool_sets, strict=True)
        ]
        return [s._replace(held=one) for s, one in zip(sampled, held, strict=True)]

    def _with_texts(self, rows: list[Prompt], opened: Sequence[Opened]) -> list[Prompt]:
        return [
            row if one.text == row.text else self.tokenize.with_text(row, one.text)
            for row, one in zip(rows, opened, strict=True)
        ]


class FunctionSession:
    """Completions that a rollout_func of the user's has made; there is nothing left to sample."""

    environments: list[Any] | None = None

    def __init__(self, made: Made):
        self.rows, self.rollout = made
        trajectories = self.rollout.trajectories or []
        self.texts = {row: one.messages for row, one in enumerate(trajectories)}

    @classmethod
    @contextmanager
    def open(
        cls,
        rows: list[Prompt],
        sampling: Sampling,
        *,
        function: Callable[[list[Any]], Any],
        tokenizer: Any,
        ends: set[int],
        num_ids: int | None,
    ) -> Iterator[FunctionSession]:
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        yield cls(call_rollout_func(function, rows, decode=decode, ends=ends, num_ids=num_ids))

    def sample(self, seeds: list[int], mode: str, finished: Finished) -> Rollout:
        ids, sampled = self.rollout.completion_ids, self.rollout.num_sampled
        for row, (completion, count) in enumerate(zip(ids, sampled, strict=True)):
            finished(row, completion, count)
        return self.rollout


def dataset_row(prompt: Prompt) -> dict[str, Any]:
    """Its columns, `prompt` among them where the dataset has it."""
    if prompt.text is EMPTY_PROMPT:
        return prompt.columns
    return {**prompt.columns, "prompt": prompt.text}


def inputs_of(rows: Sequence[Prompt]) -> list[ImageInputs] | None:
    """What the rows' prompts bring beside their ids; None in a text run."""
    inputs = [row.inputs for row in rows if row.inputs is not None]
    return inputs if len(inputs) == len(rows) else None


def raw_of(rows: Sequence[Prompt]) -> list[RawPrompt] | None:
    """The rows' prompts for an engine that reads images itself."""
    raw = [row.raw for row in rows if row.raw is not None]
    return raw if rows and len(raw) == len(rows) else None
