"""Judgements -> win rate, its interval, and figures that show a judge with a bias."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from .compare import TIE, Judgement

Z = 1.959964  # of a standard normal variable, 95 % lie within -Z .. Z


def wilson(rate: float, n: int) -> tuple[float, float]:
    """(rate + z^2/2n  -+  z sqrt(rate (1 - rate)/n + z^2/4n^2)) / (1 + z^2/n)  (Wilson, 1927).

    The 95 % interval of a probability of which n independent draws had the mean `rate`. With both
    orders a draw may be a half: values in [0, 1] have at most the variance rate (1 - rate), so the
    interval is then too wide rather than too narrow.
    """
    if n == 0:
        return 0.0, 1.0
    middle = rate + Z * Z / (2 * n)
    half = Z * math.sqrt(rate * (1 - rate) / n + (Z / (2 * n)) ** 2)
    scale = 1 + Z * Z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def summarize(rows: Sequence[Sequence[Judgement]]) -> dict[str, Any]:
    """The figures of a comparison; rates are None where nothing was decided.

    win_rate: mean over pairs of the share of the orders in which the model won. A pair counts if
    every order asked for has a verdict; ties and unreadable answers are counted apart. first_won:
    share of all verdicts that went to the text shown first; 0.5 means that position did not matter.
    """
    asked = [judgement for row in rows for judgement in row]
    pairs = [share for row in rows if (share := share_won(row)) is not None]
    rate = fmean(pairs) if pairs else None
    low, high = wilson(rate or 0.0, len(pairs))
    first = [float(j.verdict.index == 0) for j in asked if j.verdict.index is not None]
    without = Counter(j.verdict.why for j in asked if j.verdict.index is None)
    ties = without.pop(TIE, 0)
    return {
        "win_rate": rate,
        "win_rate_low": low if pairs else None,
        "win_rate_high": high if pairs else None,
        "num_pairs": len(rows),
        "num_decided": len(pairs),
        "num_wins": pairs.count(1.0),
        "num_losses": pairs.count(0.0),
        "num_split": pairs.count(0.5),  # both orders, a win in one of them
        "num_asked": len(asked),
        "num_ties": ties,
        "num_no_verdict": sum(without.values()),
        "no_verdict": dict(without),
        "first_won": fmean(first) if first else None,
    }


def share_won(row: Sequence[Judgement]) -> float | None:
    """1, 0, or 0.5 where the two orders disagree; None if one of them has no verdict."""
    won = [judgement.won for judgement in row]
    known = [value for value in won if value is not None]
    return fmean(known) if len(known) == len(won) else None
