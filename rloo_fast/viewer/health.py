"""What may be wrong with a run: each check with the line at which to worry, and why.

Lines come from the run where it has them (the sampler check, max_grad_norm); the others are rules
of thumb, and say so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from ..reports.panels import Rows, is_value

NUM_FIRST = 5  # logs that say what a run began with
NUM_NEWEST = 5  # logs that say how it is


PART = re.compile(r"rewards/.+/mean")
PARTS_WHY = (
    "The reward and what it is made of. When it rises while one of its parts, or the accuracy, "
    "falls below half of its best, the policy is paid for something else than you mean: the surest "
    "sign of reward hacking. Give what you care about as a reward of its own, with weight 0 if it "
    "is not to be trained on."
)


class Check(NamedTuple):
    """A curve and its lines. source: metrics | steps (what files of _view/ say of each step)."""

    key: str
    title: str
    unit: str
    why: str
    source: str = "metrics"
    is_bad: Callable[[float, Mapping[str, float]], bool] = lambda value, lines: False
    lines: Callable[[Any], dict[str, float]] = lambda facts: {}


class Facts(NamedTuple):
    """What lines are drawn from."""

    rows: Rows
    steps: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]

    def first(self, key: str) -> float | None:
        """What a metric was at the start: the median of its first logs."""
        values = [row[key] for row in self.rows if is_value(row.get(key))][:NUM_FIRST]
        return median(values) if values else None


def above(value: float, lines: Mapping[str, float]) -> bool:
    return any(value >= line for line in lines.values())


def outside(value: float, lines: Mapping[str, float]) -> bool:
    return not min(lines.values()) <= value <= max(lines.values())


def below(value: float, lines: Mapping[str, float]) -> bool:
    return value <= max(lines.values())


def fixed(**lines: float) -> Callable[[Facts], dict[str, float]]:
    return lambda facts: {name.replace("_", " "): line for name, line in lines.items()}


def _of_start(key: str, **factors: float) -> Callable[[Facts], dict[str, float]]:
    def lines(facts: Facts) -> dict[str, float]:
        start = facts.first(key)
        if not start:
            return {}
        return {name.replace("_", " "): factor * start for name, factor in factors.items()}

    return lines


def _sampler_limits(facts: Facts) -> dict[str, float]:
    newest = next((step for step in reversed(facts.steps) if "logp_diff_warn" in step), {})
    lines = {"warn": newest.get("logp_diff_warn"), "stop": newest.get("logp_diff_stop")}
    return {name: line for name, line in lines.items() if line}


def _max_grad_norm(facts: Facts) -> dict[str, float]:
    limit = facts.config.get("max_grad_norm")
    return {"clipped from here": limit} if limit and math.isfinite(limit) else {}


def _ten_times_clipped(value: float, lines: Mapping[str, float]) -> bool:
    return value >= 10 * min(lines.values())


CHECKS = (
    Check(
        "sampling/logp_diff_judged",
        "Sampler against trainer",
        "nats per token",
        "The engine's log-probs should be the trainer's but for rounding. At the line the run "
        "warns, and stops at the next: stale weights, another temperature, or a cache of older "
        "weights. The lines are those of this run's own check.",
        is_bad=above,
        lines=_sampler_limits,
    ),
    Check(
        "frac_reward_zero_std",
        "Groups without signal",
        "share of groups",
        "All completions of such a group have the same reward, so its advantages are 0 and it "
        "teaches nothing. Beyond half, most of the sampling is wasted: prompts are too easy or too "
        "hard, or num_generations is too small. The line is a rule of thumb.",
        is_bad=above,
        lines=fixed(half=0.5),
    ),
    Check(
        "completions/clipped_ratio",
        "Cut at the length limit",
        "share of completions",
        "A cut completion is scored without its end, so the reward measures the limit as well as "
        "the answer. Raise max_completion_length, or set mask_truncated_completions. The line is "
        "a rule of thumb.",
        is_bad=above,
        lines=fixed(a_fifth=0.2),
    ),
    Check(
        "kl",
        "KL to the reference",
        "nats per token",
        "How far the policy has left its start. At half a nat per token its text is another "
        "model's, and a reward that still rises is likely to be gamed: read the completions, or "
        "raise beta. The line is a rule of thumb.",
        is_bad=above,
        lines=fixed(far=0.5),
    ),
    Check(
        "entropy",
        "Entropy",
        "nats per token",
        "Near 0 all samples of a prompt are the same text: nothing is left to compare. Far above "
        "its start, the policy falls apart. The lines are a tenth and three times the first logs, "
        "rules of thumb.",
        is_bad=outside,
        lines=_of_start("entropy", collapsed=0.1, falling_apart=3.0),
    ),
    Check(
        "grad_norm",
        "Gradient norm",
        "before clipping",
        "Above max_grad_norm gradients are scaled down, which is usual. Ten times above it, a few "
        "completions decide the step: lower the learning rate, or look for rewards far from the "
        "rest.",
        is_bad=_ten_times_clipped,
        lines=_max_grad_norm,
    ),
    Check(
        "frac_repeated",
        "Repeated texts",
        "share of completions",
        "Completions that answer another prompt of their step word for word, too. When they rise "
        "with the reward, the policy has found one answer that pays everywhere: the most common "
        "look of reward hacking. Where many prompts have one right answer, they repeat by nature. "
        "The line is a rule of thumb.",
        source="steps",
        is_bad=above,
        lines=fixed(a_third=0.33),
    ),
    Check(
        "completions/mean_length",
        "Length drift",
        "tokens",
        "Length that drifts while the reward rises says that the reward pays for length, or for "
        "silence. The lines are half and one and a half times the first logs, rules of thumb.",
        is_bad=outside,
        lines=_of_start("completions/mean_length", half=0.5, one_and_a_half_times=1.5),
    ),
)


def health(rows: Rows, steps: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[dict]:
    """Each check: its words, its lines, its newest value, and ok | worry | unknown."""
    facts = Facts(rows, steps, config)
    return [_parts(rows), *(_judged(check, facts) for check in CHECKS)]


def _parts(rows: Rows) -> dict[str, Any]:
    """Whether the reward rises while a part of it, or the accuracy, falls to less than half of what
    it was."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if is_value(value) and (key in ("reward", "accuracy") or PART.fullmatch(key)):
                found.setdefault(key, []).append(value)
    ends = {key: (median(v[:NUM_FIRST]), median(v[-NUM_NEWEST:])) for key, v in found.items()}
    first, newest = ends.get("reward", (0.0, 0.0))
    bests = {key: max(values) for key, values in found.items() if key != "reward"}
    fell = [key for key, best in bests.items() if best > 0 and ends[key][1] < 0.5 * best]
    known = bool(bests) and len(rows) > NUM_FIRST
    state = ("worry" if fell and newest > first else "ok") if known else "unknown"
    return {
        "key": "parts", "title": "Parts of the reward", "unit": "mean", "why": PARTS_WHY,
        "source": "parts", "lines": {}, "newest": newest, "state": state,
        "series": sorted(found, key=lambda key: (key != "reward", key != "accuracy", key)),
    }  # fmt: skip


def _judged(check: Check, facts: Facts) -> dict[str, Any]:
    places = facts.rows if check.source == "metrics" else facts.steps
    values = [row[check.key] for row in places if is_value(row.get(check.key))]
    lines = check.lines(facts)
    newest = median(values[-NUM_NEWEST:]) if values else None
    state = "unknown"
    if newest is not None and lines:
        state = "worry" if check.is_bad(newest, lines) else "ok"
    return {
        "key": check.key,
        "title": check.title,
        "unit": check.unit,
        "why": check.why,
        "source": check.source,
        "lines": lines,
        "newest": newest,
        "state": state,
    }
