"""Judges that need no server: a reward model, and any function."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..rewards import RewardModel
from ..rewards.files import run_file
from ..types import PromptText
from .compare import Judge, Pair, Verdict, by_score

NAMED = re.compile(r"(?P<where>.+):(?P<function>[A-Za-z_]\w*)")


class RewardModelJudge:
    """The text with the higher reward after its prompt is better; equal rewards are a tie.

    A model that reads its value at an EOS finds one behind every text: all count as finished.
    """

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def __call__(self, prompts: Sequence[PromptText], pairs: Sequence[Pair]) -> list[Verdict]:
        first, second = (
            self._scores(prompts, texts).tolist() for texts in zip(*pairs, strict=True)
        )
        return [by_score(*both) for both in zip(first, second, strict=True)]

    def _scores(self, prompts: Sequence[PromptText], texts: Sequence[str]) -> Tensor:
        completions = [
            # a text in the form of its prompt, as reward models take them
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        ended = [[self.model.inputs.tokenizer.eos_token_id]] * len(texts)
        return self.model(prompts, completions, ended)


def load_function(name: str) -> Judge:
    """ "package.module:function" or "path/to/file.py:function" -> the function.

    Raises ValueError where there is none.
    """
    match = NAMED.fullmatch(name)
    if match is None:
        raise ValueError(f"a judge is written module:function or file.py:function, got {name!r}.")
    where = match["where"]
    try:
        if where.endswith(".py"):
            path = Path(where).expanduser().resolve(strict=True)
            module = run_file(f"rloo_fast_judge_{path.stem}_{abs(hash(path))}", path)
        else:
            module = importlib.import_module(where)
    except Exception as error:  # a module can raise anything
        raise ValueError(
            f"the judge {name!r} could not be loaded: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, match["function"], None)
    if not callable(function):
        raise ValueError(f"the judge {name!r}: there is no function {match['function']!r} there.")
    return function  # pyright: ignore[reportReturnType]  # what it returns is checked
