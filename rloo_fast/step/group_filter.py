"""rollout_filter: a function of the user's that says which groups may be trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator

from ..distributed.collectives import gather_objects
from ..masking import shown
from ..records import Prompt, SampledGroup
from .groups import Group

RolloutFilter = Callable[[SampledGroup], bool]


class GroupFilter:
    """Asks the function about every group, in the order of the prompts, on the main process alone:
    the others go by what it said."""

    def __init__(self, function: RolloutFilter, name: str, accelerator: Accelerator):
        self.function, self.name, self.accelerator = function, name, accelerator

    def here(self, groups: Sequence[Group], prompts: Sequence[Prompt]) -> list[bool]:
        """On the main process, what the function says; None on the others. Raises ValueError with
        the group that it failed on."""
        if not self.accelerator.is_main_process:
            return []
        return [self._keeps(*pair) for pair in zip(groups, prompts, strict=True)]

    def everywhere(self, said: list[bool]) -> list[bool]:
        return gather_objects(self.accelerator, said)[0]

    def _keeps(self, group: Group, prompt: Prompt) -> bool:
        which = f"rollout_filter={self.name!r} on the group of prompt {shown(prompt.text)}"
        try:
            answer: Any = self.function(_sampled_group(group, prompt))
        except Exception as error:  # the user's code
            raise ValueError(f"{which} failed: {type(error).__name__}: {error}") from error
        if not isinstance(answer, bool | np.bool_):
            raise ValueError(f"{which} must return True (keep it) or False, got {answer!r}.")
        return bool(answer)


def _sampled_group(group: Group, prompt: Prompt) -> SampledGroup:
    batch, texts = group.batch, group.texts
    assert texts is not None
    return SampledGroup(
        prompt=prompt.text,
        columns=prompt.columns,
        completions=texts.completions,
        completion_ids=batch.completion_ids,
        rewards=texts.rewards,
        reward=batch.rows.reward.tolist(),
        lengths=batch.rows.length.tolist(),
        truncated=batch.rows.truncated.tolist(),
    )
