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
    "completion_text",
    "load_reward_functions",
    "load_reward_model",
]

RewardFunc = str | PreTrainedModel | Callable[..., Sequence[float | None]]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_MODULE_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
_FILE_FUNCTION = re.compile(r"(.+\.py):([A-Za-z_]\w*)")


def load_reward_functions(
    reward_funcs: RewardFunc | list[RewardFunc],
    processing_classes: Any = None,
    *,
    weights: list[float] | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    timeout_s: float | None = None,
    batch_size: int | None = None,
    processes: int = 0,
) -> Rewards:
    """Functions, models and names of either -> Rewards.

    A string is the name of a builtin, "package.module:function", "path/to/file.py:function", or the
    directory or hub id ("org/name") of a reward model; in this order. `processing_classes`: the
    reward models' tokenizers, one per entry of `reward_funcs` (None: the model's own; ignored for
    functions). `timeout_s` limits each call of a function, not the models; `batch_size` is the
    models'. `processes`: as many of them run the functions that are not async, 0: this one.
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
    model_options = {"chat_template_kwargs": chat_template_kwargs, "batch_size": batch_size}
    loaded: list[RewardFunction | RewardModel] = []
    for func, tokenizer in zip(funcs, processing_classes, strict=True):
        found = _resolve(func) if isinstance(func, str) else func
        if isinstance(found, str):
            loaded.append(
                load_reward_model(
                    found,
                    tokenizer,
                    model_init_kwargs=model_init_kwargs,
                    trust_remote_code=trust_remote_code,
                    **model_options,
                )
            )
        elif isinstance(found, nn.Module):
            loaded.append(RewardModel(found, tokenizer, **model_options))
        elif callable(found):
            loaded.append(RewardFunction(found))
        else:
            raise ValueError(
                "A reward function is a callable, a reward model or a string, got "
                f"{type(found).__name__}: {found!r:.80}."
            )
    return Rewards(loaded, weights, timeout_s, processes)


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
