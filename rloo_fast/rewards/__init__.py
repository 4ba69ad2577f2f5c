"""Rewards: (prompt, completion) -> float, from functions, reward models and names of either."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rloo_fast.rewards.arguments import bind, check_arguments, check_reward_kwargs
from rloo_fast.rewards.builtin import BUILTINS, completion_text
from rloo_fast.rewards.calls import RewardError, RewardTimeout
from rloo_fast.rewards.files import load_file
from rloo_fast.rewards.functions import RewardFunction, Rewards
from rloo_fast.rewards.models import RewardModel, load_reward_model
from rloo_fast.rewards.overlap import Scoring

__all__ = [
    "BUILTINS",
    "RewardError",
    "RewardFunc",
    "RewardFunction",
    "RewardModel",
    "RewardTimeout",
    "Rewards",
    "Scoring",
    "check_reward_kwargs",
    "completion_text",
    "load_reward_functions",
    "load_reward_model",
]

RewardFunc = str | PreTrainedModel | RewardModel | Callable[..., Sequence[float | None]]

MODEL_OPTIONS = ("label", "output", "position", "dtype", "batch_size", "chat_template_kwargs")
MODEL_CODE = (
    "The reward {0!r} runs programs that the model wrote, on this machine: in processes of their "
    "own, with little room and no network, but no such wall is perfect. If you want that, write "
    "execute_model_code=True (--execute_model_code true)."
)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_MODULE_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
_FILE_FUNCTION = re.compile(r"(.+\.py):([A-Za-z_]\w*)")


def load_reward_functions(
    reward_funcs: RewardFunc | list[RewardFunc],
    processing_classes: Any = None,
    *,
    weights: list[float] | None = None,
    reward_kwargs: dict[str, dict[str, Any]] | None = None,
    execute_model_code: bool = False,
    model_options: dict[str, Any] | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    timeout_s: float | None = None,
    batch_size: int | None = None,
    processes: int = 0,
) -> Rewards:
    """Functions, models and names of either -> Rewards.

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

    Raises ValueError for whatever cannot be loaded or does not match.
    """
    funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    if not isinstance(processing_classes, list):
        processing_classes = [processing_classes] * (
            len(funcs) if processing_classes is None else 1
        )
    if len(processing_classes) != len(funcs):
        raise ValueError(
            f"One processing class per reward function is needed (None for those that are not "
            f"models): got {len(processing_classes)} for {len(funcs)} functions."
        )
    options = {
        "chat_template_kwargs": chat_template_kwargs,
        "batch_size": batch_size,
        **(model_options or {}),
    }
    loading = {"model_init_kwargs": model_init_kwargs, "trust_remote_code": trust_remote_code}
    given = reward_kwargs or {}
    check_reward_kwargs(given, funcs)
    loaded: list[RewardFunction | RewardModel] = []
    for func, tokenizer in zip(funcs, processing_classes, strict=True):
        found, arguments = func, {}
        if isinstance(func, str):
            arguments = given.get(func, {})
            found = _named(func, arguments, execute_model_code)
        if isinstance(found, str):
            own = {**options, **arguments}
            loaded.append(load_reward_model(found, tokenizer, **loading, **own))
        elif isinstance(found, RewardModel):
            loaded.append(found)
        elif isinstance(found, nn.Module):
            has_dtype = {k: v for k, v in options.items() if k != "dtype"}
            loaded.append(RewardModel(found, tokenizer, **has_dtype))
        elif callable(found):
            loaded.append(RewardFunction(found))
        else:
            raise ValueError(
                "A reward function is a callable, a reward model or a string, got "
                f"{type(found).__name__}: {found!r:.80}."
            )
    return Rewards(loaded, weights, timeout_s, processes)


def _named(
    name: str, arguments: dict[str, Any], execute_model_code: bool
) -> Callable[..., Any] | str:
    """The function or object, with its arguments, or the string itself if it is a reward model."""
    found = _resolve(name)
    if isinstance(found, str):
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
        return _member(load_file(Path(match[1]), target), match[2], target)
    if match := _MODULE_FUNCTION.fullmatch(target):
        return _member(_load_module(match[1], target), match[2], target)
    if Path(target).is_dir() or _HUB_ID.fullmatch(target):
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
