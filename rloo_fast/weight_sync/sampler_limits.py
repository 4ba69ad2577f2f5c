"""How far sampler and trainer may differ: limits that come from the run's own first steps.

    baseline = min(first mean, median of the first 5 means)        of the violation, nats per token
    warn at 3 x baseline, stop at 10 x baseline                    baseline in [smallest, largest]

The first mean is of the weights that the run starts with, so no missed sync can be in it; the
median keeps one odd step out. Rounding grows with the entropy of a policy, which may rise, hence
`smallest`; an engine that is wrong from the start is not its own excuse, hence `largest`.
"""

from __future__ import annotations

import logging
from statistics import median
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

NUM_FIRST = 5
WARN_FACTOR, STOP_FACTOR = 3.0, 10.0


class Rounding(NamedTuple):
    """Mean violation of a healthy engine, from rounding alone, and the limits while there is no
    baseline."""

    smallest: float  # less in its first steps may become this much later
    largest: float
    warn: float
    stop: float


# float32: 1e-7 to 1e-5 on a CPU, up to 1e-3 on a GPU, whose attention multiplies in TF32
EXACT = Rounding(1e-4, 2e-3, warn=1e-3, stop=1e-2)
# bf16, fp16, quantised: 0.01 to 0.06, of mixtures of experts the most
COARSE = Rounding(0.01, 0.06, warn=0.05, stop=0.5)


class SamplerLimits:
    """`warn` and `stop`: the user's own, which stay (0: never); None: as above, and those of
    `rounding` until there is a baseline.

    Part of a checkpoint; the same on all processes, as the means are.
    """

    def __init__(
        self,
        rounding: Rounding,
        warn: float | None = None,
        stop: float | None = None,
        *,
        is_main_process: bool = True,
    ):
        self.rounding, self.set_warn, self.set_stop = rounding, warn, stop
        self.is_main_process = is_main_process
        self.first: list[float] = []  # mean violations of the first steps

    @property
    def baseline(self) -> float | None:
        """None: not known yet, or more than rounding makes."""
        if len(self.first) < NUM_FIRST or self._measured > self.rounding.largest:
            return None
        return max(self._measured, self.rounding.smallest)

    @property
    def _measured(self) -> float:
        return min(self.first[0], median(self.first))

    @property
    def warn(self) -> float:
        return self._limit(self.set_warn, self.rounding.warn, WARN_FACTOR)

    @property
    def stop(self) -> float:
        return self._limit(self.set_stop, self.rounding.stop, STOP_FACTOR)

    def _limit(self, as_set: float | None, at_first: float, factor: float) -> float:
        if as_set is not None:
            return as_set
        return at_first if self.baseline is None else factor * self.baseline

    def add(self, mean: float) -> None:
        """The mean violation of a training step that was let pass."""
        if len(self.first) < NUM_FIRST:
            self.first.append(mean)
            if len(self.first) == NUM_FIRST:
                self._announce()

    def _announce(self) -> None:
        """Once, when the baseline is known: which limits hold from now on, and why."""
        if not self.is_main_process or None not in (self.set_warn, self.set_stop):
            return
        now = f"warns at {self.warn:.3g}, stops at {self.stop:.3g}"
        if self.baseline is None:
            logger.warning(
                "In the first %d steps the log-probs of rollout engine and trainer differ by %.3g "
                "per token, more than a healthy engine's (%g), so they are no measure for later "
                "ones. The sampler check %s.",
                *(NUM_FIRST, self._measured, self.rounding.largest, now),
            )
            return
        logger.info(
            "The sampler check %s: %g and %g times what the first %d steps differ by, %.3g (at "
            "least %g is assumed), where logp_diff_warn and logp_diff_stop do not say.",
            *(now, WARN_FACTOR, STOP_FACTOR, NUM_FIRST, self._measured, self.rounding.smallest),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"first_logp_diffs": list(self.first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        was_known = len(self.first) == NUM_FIRST
        self.first = list(state.get("first_logp_diffs", []))  # older checkpoints have none
        if len(self.first) == NUM_FIRST and not was_known:
            self._announce()
