"""Judges that need no server: a reward model, and any function."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from ..config.code_files import load_module
from ..records import PromptText
from ..rewards import RewardModel
from .compare import Judge, Pair, Verdict, higher_wins

NAMED = re.compile(r"(?P<where>.+):(?P<function>[A-Za-z_]\w*)", re.DOTALL)


class RewardModelJudge:
    """The text with the higher reward after its prompt wins; equal rewards are a tie.

    Every text counts as finished: a model that reads its reward at an EOS finds one behind each.
    """

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def __call__(self, prompts: Sequence[PromptText], pairs: Sequence[Pair]) -> list[Verdict]:
        first, second = (
            self._rewards(prompts, texts).tolist() for texts in zip(*pairs, strict=True)
        )
        return [higher_wins(*both) for both in zip(first, second, strict=True)]

    def to(self, device: str) -> None:
        self.model.model.to(device)

    def _rewards(self, prompts: Sequence[PromptText], texts: Sequence[str]) -> Tensor:
        completions = [
            # a text in the form of its prompt, as reward models take them
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return self.model(prompts, completions, ended=[True] * len(texts))


def load_function(name: str) -> Judge:
    """ "package.module:function" or "path/to/file.py:function" -> the function.

    Raises ValueError where there is none.
    """
    match = NAMED.fullmatch(name)
    if match is None:
        raise ValueError(f"a judge is written module:function or file.py:function, got {name!r}.")
    module = load_module(match["where"], f"the judge {name!r}")
    function: Judge | None = getattr(module, match["function"], None)
    if not callable(function):
        raise ValueError(f"the judge {name!r}: there is no function {match['function']!r} there.")
    return function
