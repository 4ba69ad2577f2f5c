"""Which weights the policy has: rollout engines and the sampler check tell them apart by number."""

from __future__ import annotations


class PolicyVersion:
    """A number that rises whenever the weights may have changed, and never falls."""

    def __init__(self) -> None:
        self._number = 0

    def current(self) -> int:
        return self._number

    def advance(self) -> None:
        self._number += 1
