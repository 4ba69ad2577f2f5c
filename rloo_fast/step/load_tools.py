"""The tools of a run: which ones, and what of the other arguments must suit them.

All of it is said before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import AutoTokenizer

from ..config.rloo_config import RLOOConfig, as_dict
from ..config.tool_use import ToolUse
from ..data.checks import evaluation_sets
from ..data.first_rows import columns_of, first_row
from ..data.tokenize import is_conversational
from ..masking import shown
from ..rewards import RewardSources
from ..rewards.functions import ENVIRONMENTS
from ..rollout.trajectories import Language
from ..tools import RunTools
from ..tools.environments import NAME_COLUMN
from ..tools.run_tools import EMPTY_PROMPT
from ..tools.templates import check_shows_tools


class ToolArguments(NamedTuple):
    """Arguments of RLOOTrainer by which completions become trajectories."""

    tools: Any = None
    environment_factory: Any = None
    rollout_func: Callable[[list[Any]], Any] | None = None  # prompts -> see `rollout_func.py`

    @classmethod
    def of(
        cls, trainer: Any, tools: Any, environment_factory: Any, rollout_func: Any
    ) -> ToolArguments:
        """With a rollout_func that knows its trainer. Raises TypeError for one that is none."""
        if rollout_func is None:
            return cls(tools, environment_factory)
        if not callable(rollout_func):
            raise TypeError(
                "rollout_func must be callable, as rollout_func(prompts, trainer), got "
                f"{type(rollout_func).__name__}."
            )
        return cls(tools, environment_factory, lambda prompts: rollout_func(prompts, trainer))


def load_tools(given: ToolArguments, args: RLOOConfig) -> RunTools | None:
    """The run's tools and environments; None without any.

    Raises TypeError or ValueError for what is no tool, and for settings that contradict them.
    """
    has_tools = bool(given.tools) or given.environment_factory is not None
    if given.rollout_func is not None:
        _check_rollout_func(args, has_tools=has_tools)
    if not has_tools:
        _refuse_settings_without_tools(args)
        return None
    tools = RunTools(
        given.tools,
        given.environment_factory,
        timeout_s=args.tool_timeout_s,
        threads=args.tool_threads,
        failure_ends=args.tool_failure == "end",
        execute_model_code=args.execute_model_code,
    )
    if args.max_staleness and not args.tool_threads:
        raise ValueError(
            f"tool_threads=0 with max_staleness={args.max_staleness} is refused: trajectories are "
            "sampled while the trainer's own thread trains, so that tools cannot run in it. Leave "
            "tool_threads out."
        )
    if tools.has_environments and args.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns=True leaves nothing for environments, whose reset is called "
            "with the columns of a row: leave it False."
        )
    if tools.has_environments and args.reward_processes:
        raise ValueError(
            f"reward_processes={args.reward_processes} is not offered with environment_factory: "
            "reward functions get the environments themselves, which are in the trainer's process. "
            "Leave it at 0."
        )
    return tools


def _check_rollout_func(args: RLOOConfig, *, has_tools: bool) -> None:
    if has_tools:
        raise ValueError(
            "rollout_func makes the whole of every completion, so that tools and "
            "environment_factory would never be used: pass it, or them."
        )
    if args.max_staleness:
        raise ValueError(
            f"max_staleness={args.max_staleness} with rollout_func is refused: it samples with "
            "what it likes, so that nobody knows which weights drew a token, and how old it is. "
            "Leave one of them out."
        )


def _refuse_settings_without_tools(args: RLOOConfig) -> None:
    defaults = {name: field.default for name, field in ToolUse.__dataclass_fields__.items()}
    if wrong := [name for name, default in defaults.items() if getattr(args, name) != default]:
        raise ValueError(
            f"{' and '.join(wrong)} has no effect without tools or an environment_factory: pass "
            "them to the trainer, or leave it out."
        )


def dataset_of(train: Any, tools: RunTools | None, args: RLOOConfig) -> Any:
    """`train`, or, where the environment alone writes the prompts, rows of empty ones."""
    if train is not None or tools is None or not tools.has_environments:
        return train
    if None not in tools.kinds:
        raise ValueError(
            "with several environments, `train_dataset` is required: its column "
            f"{NAME_COLUMN!r} says which one a row is for."
        )
    if args.max_steps <= 0:
        raise ValueError(
            "without a train_dataset (the environment writes the prompts, in reset) the run has "
            f"no length: set max_steps, which is {args.max_steps}."
        )
    return Dataset.from_dict({"prompt": [EMPTY_PROMPT] * args.prompts_per_generation})


def with_environment_rewards(
    reward_funcs: Any, processing_classes: Any, args: RLOOConfig, tools: RunTools | None
) -> RewardSources:
    """The rewards that were given, and those of environments that have `get_reward`."""
    more = tools.rewards() if tools is not None else []
    sources = reward_funcs
    if not isinstance(sources, RewardSources):
        may_be_none = bool(more) or not args.reward_weights
        sources = RewardSources.from_config(
            sources, processing_classes, args, may_be_none=may_be_none
        )
    sources = sources.with_functions(more)
    if not sources.sources:
        raise ValueError(
            "At least one reward function is needed, got none: pass reward_funcs, or an "
            "environment_factory whose environments have get_reward(self)."
        )
    return sources


def check_rows(
    train: Any, evaluation: Any, tools: RunTools, sources: RewardSources, *, look: bool
) -> Callable[[Any], None]:
    """Raise ValueError unless the first row of each set is a conversation, and columns and names of
    environments are known.

    Returns the check of columns that rows without `column_names` go through as they are read.
    """

    def check_columns(columns: Any) -> None:
        columns = list(columns)
        if tools.has_environments and ENVIRONMENTS in columns:
            raise ValueError(
                f"the column {ENVIRONMENTS!r} has the name under which reward functions get the "
                "environments of the run: rename it."
            )
        tools.check_columns(columns)
        sources.check_columns([*columns, *([ENVIRONMENTS] if tools.has_environments else [])])

    for name, dataset in [("train_dataset", train), *evaluation_sets(evaluation)]:
        columns = columns_of(dataset, name, look=look)
        if columns is not None and look:
            _check_first_row(dataset, name)
        if columns is not None and NAME_COLUMN in columns and isinstance(dataset, Dataset):
            for environment in dict.fromkeys(dataset[NAME_COLUMN]):
                tools.schemas({NAME_COLUMN: environment})
    return check_columns


def _check_first_row(dataset: Any, name: str) -> None:
    row: Any = first_row(dataset)
    if isinstance(row, dict) and "prompt" in row and not is_conversational(row["prompt"]):
        raise ValueError(
            f"{name}: with tools, prompts are conversations, as [{{'role': 'user', 'content': "
            f"'...'}}]; the first one is {shown(row['prompt'])}."
        )


def check_template(
    model: Any, processing_class: Any, args: RLOOConfig, tools: RunTools, from_hub: dict[str, Any]
) -> Any:
    """The tokenizer, if it can be read without the model (else None), whose chat template must show
    tools, calls and answers. Raises ValueError."""
    tokenizer = processing_class
    if tokenizer is None:
        config = getattr(model, "config", None)
        name = model if isinstance(model, str) else getattr(config, "_name_or_path", "")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **from_hub)
        except Exception:  # what is wrong is said once the model is loaded, which may not need it
            return None
    all_tools = [*tools.tools, *(tool for kind in tools.kinds.values() for tool in kind.tools)]
    schemas = [tool.schema for tool in all_tools]
    check_shows_tools(tokenizer, schemas, as_dict(args.chat_template_kwargs))
    Language.of(tokenizer, as_dict(args.chat_template_kwargs), ())
    return tokenizer
