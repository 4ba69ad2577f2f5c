"""What a run's reward_funcs stand for: found and checked first, reward models loaded after that."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from ..config.paths import user_path
from ..models.loading import check_model_path
from .arguments import bind, check_arguments, check_reward_kwargs
from .builtin import BUILTINS
from .files import load_file
from .functions import RewardFunction, Rewards, check_columns, check_weights
from .models import RewardModel, load_reward_model
from .over_limit import END_THE_RUN

if TYPE_CHECKING:
    from ..config.rloo_config import RLOOConfig

RewardFunc = str | PreTrainedModel | RewardModel | Callable[..., Sequence[float | None]]

MODEL_OPTIONS = ("label", "output", "position", "dtype", "batch_size", "chat_template_kwargs")
MODEL_CODE = (
    "The reward {0!r} runs programs that the model wrote, on this machine: in processes of their "
    "own, with little room and no network, but no such wall is perfect. If you want that, write "
    "execute_model_code=True (--execute_model_code true)."
)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_MODULE_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
_FILE_FUNCTION = re.compile(r"(.+\.py):([A-Za-z_]\w*)", re.DOTALL)


@dataclass(frozen=True)
class ModelSource:
    """A reward model that is still to be loaded (a string) or wrapped (a module).

    `loading`: what load_reward_model takes beside the `options` of RewardModel.
    """

    model: str | nn.Module
    tokenizer: Any
    options: Mapping[str, Any]
    loading: Mapping[str, Any]

    def load(self) -> RewardModel:
        if isinstance(self.model, str):
            return load_reward_model(self.model, self.tokenizer, **self.loading, **self.options)
        return RewardModel(self.model, self.tokenizer, **self.options)


@dataclass(frozen=True)
class RewardSources:
    """The rewards of a run before a model is loaded: functions are imported and checked.

    weights: one per source. timeout_s: of each call of a function, not of the models. processes:
    as many run the functions that are not async, 0: this one. over_limit: see OverLimit.
    """

    sources: tuple[RewardFunction | RewardModel | ModelSource, ...]
    weights: tuple[float, ...]
    timeout_s: float | None = None
    processes: int = 0
    over_limit: float | str | None = END_THE_RUN

    @classmethod
    def from_config(
        cls,
        reward_funcs: RewardFunc | list[RewardFunc] | None,
        processing_classes: Any,
        args: RLOOConfig,
        *,
        may_be_none: bool = False,
    ) -> RewardSources:
        """find_rewards with the values of `args`."""
        # not above: the worker processes of reward functions import this file
        from ..config.rloo_config import as_dict

        return find_rewards(
            reward_funcs,
            processing_classes,
            weights=args.reward_weights,
            reward_kwargs=as_dict(args.reward_kwargs),
            execute_model_code=args.execute_model_code,
            model_options={
                "label": args.reward_model_label,
                "output": args.reward_model_output,
                "position": args.reward_model_position,
                "dtype": args.reward_model_dtype,
            },
            model_init_kwargs=as_dict(args.model_init_kwargs),
            trust_remote_code=args.trust_remote_code,
            chat_template_kwargs=as_dict(args.chat_template_kwargs),
            timeout_s=args.reward_timeout_s,
            batch_size=args.rollout_forward_batch_size,
            processes=args.reward_processes,
            over_limit=args.reward_over_limit,
            may_be_none=may_be_none,
        )

    def check_columns(self, columns: Iterable[str]) -> None:
        """ValueError if these dataset columns do not suit the functions."""
        check_columns(self.sources, columns)

    def load(self) -> Rewards:
        """Load the reward models. Raises ValueError for one that cannot be used."""
        loaded = [s.load() if isinstance(s, ModelSource) else s for s in self.sources]
        return Rewards(loaded, self.weights, self.timeout_s, self.processes, self.over_limit)

    def with_functions(self, functions: Iterable[Callable[..., Any]]) -> RewardSources:
        """These and more functions, of weight 1."""
        more = tuple(RewardFunction(function) for function in functions)
        weights = (*self.weights, *[1.0] * len(more))
        return replace(self, sources=(*self.sources, *more), weights=weights)


def load_reward_functions(
    reward_funcs: RewardFunc | list[RewardFunc], processing_classes: Any = None, **options: Any
) -> Rewards:
    """Rewards of whatever a run's `reward_funcs` may be: names, functions, models, or a list of
    them, with their models loaded.

    `options`: weights, reward_kwargs, execute_model_code, timeout_s, batch_size, processes,
    over_limit, and model_options, the arguments of RewardModel. Raises ValueError for what cannot
    be found.
    """
    return find_rewards(reward_funcs, processing_classes, **options).load()


def find_rewards(
    reward_funcs: RewardFunc | list[RewardFunc] | None,
    processing_classes: Any = None,
    *,
    weights: Sequence[float] | None = None,
    reward_kwargs: Mapping[str, dict[str, Any]] | None = None,
    execute_model_code: bool = False,
    model_options: Mapping[str, Any] | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    timeout_s: float | None = None,
    batch_size: int | None = None,
    processes: int = 0,
    over_limit: float | str | None = END_THE_RUN,
    may_be_none: bool = False,
) -> RewardSources:
    """Functions, models and names of either; no model is loaded.

    A string is the name of a builtin, "package.module:function", "path/to/file.py:function", or the
    directory or hub id ("org/name") of a reward model; in this order. Of a class an object is made.

    reward_kwargs: by such a string, the arguments of a function at every call, of a class or a
        RewardModel when it is made.
    execute_model_code: allow strings for what has `executes_model_code = True`. An object that is
        passed has been allowed by whoever made it.
    processing_classes: the reward models' tokenizers, one per entry of `reward_funcs` (None: the
        model's own; ignored for functions).
    model_options: of RewardModel, and `dtype`; not for what is a RewardModel already.
    timeout_s: of each call of a function, not of the models; batch_size: of the models.
    processes: as many run the functions that are not async, 0: this one.
    over_limit: the reward of a completion that takes a function longer, None or "none": not
        scored, "error": the run ends.
    may_be_none: there are others, which are added to these.

    Raises ValueError for whatever cannot be found or does not match.
    """
    funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    if may_be_none and reward_funcs in (None, []) and not weights:
        funcs = weights = []
    else:
        weights = check_weights(weights, len(funcs))
    given = reward_kwargs or {}
    check_reward_kwargs(given, funcs)
    options = {
        "chat_template_kwargs": chat_template_kwargs,
        "batch_size": batch_size,
        **(model_options or {}),
    }
    loading = {"model_init_kwargs": model_init_kwargs, "trust_remote_code": trust_remote_code}
    found = []
    for func, tokenizer in zip(funcs, _tokenizers(processing_classes, len(funcs)), strict=True):
        named = isinstance(func, str)
        arguments = given.get(func, {}) if named else {}
        source = _named(func, arguments, execute_model_code) if named else func
        if isinstance(source, str):
            found.append(ModelSource(source, tokenizer, {**options, **arguments}, loading))
        elif isinstance(source, RewardModel):
            found.append(source)
        elif isinstance(source, nn.Module):
            without_dtype = {k: v for k, v in options.items() if k != "dtype"}
            found.append(ModelSource(source, tokenizer, without_dtype, {}))
        elif callable(source):
            found.append(RewardFunction(source))
        else:
            raise ValueError(
                "A reward function is a callable, a reward model or a string, got "
                f"{type(source).__name__}: {source!r:.80}."
            )
    return RewardSources(tuple(found), tuple(weights), timeout_s, processes, over_limit)


def _tokenizers(processing_classes: Any, num_functions: int) -> list[Any]:
    if processing_classes is None:
        return [None] * num_functions
    given = processing_classes if isinstance(processing_classes, list) else [processing_classes]
    if len(given) != num_functions:
        raise ValueError(
            f"The number of reward processing classes ({len(given)}) must match the number of "
            f"reward functions ({num_functions}), with None for those that are not models."
        )
    return given


def _named(
    name: str, arguments: dict[str, Any], execute_model_code: bool
) -> Callable[..., Any] | str:
    """The function or object, with its arguments, or the string itself if it is a reward model."""
    found = _resolve(name)
    if isinstance(found, str):
        if Path(found).is_dir():
            check_model_path(found)
        check_arguments(name, MODEL_OPTIONS, arguments)
        return found
    if getattr(found, "executes_model_code", False) and not execute_model_code:
        raise ValueError(MODEL_CODE.format(name))
    return bind(name, found, arguments)


def _resolve(text: str) -> Callable[..., Any] | str:
    """The function a string stands for, or the string itself if it names a reward model."""
    target = BUILTINS.get(text, text)
    if callable(target):
        return target
    if match := _FILE_FUNCTION.fullmatch(target):
        return _member(load_file(user_path(match[1]), target), match[2], target)
    if match := _MODULE_FUNCTION.fullmatch(target):
        return _member(_load_module(match[1], target), match[2], target)
    if (target and Path(target).is_dir()) or _HUB_ID.fullmatch(target):
        return target
    near = difflib.get_close_matches(text, BUILTINS, n=3, cutoff=0.4)
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    if re.fullmatch(r"\w+(\.\w+)+", text):
        module, _, function = text.rpartition(".")
        meant += f" A function in a module is written {module}:{function}."
    raise ValueError(
        f"{text!r} is not a reward.{meant} A reward is one of {', '.join(map(repr, BUILTINS))}, "
        "'package.module:function', 'path/to/file.py:function', an existing directory with a "
        "reward model, or a hub id 'org/name'."
    )


def _load_module(name: str, text: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module can raise anything
        raise ValueError(
            f"The reward {text!r} could not be imported: {type(error).__name__}: {error}"
        ) from error


def _member(module: ModuleType, name: str, text: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        own = [
            k
            for k, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", None) == module.__name__
        ]
        raise ValueError(
            f"The reward {text!r}: no function {name!r} there. Its functions: "
            f"{', '.join(own) or 'none'}."
        )
    return function
