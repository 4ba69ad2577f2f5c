"""Token counts that a compiled model is run at: few, so that it is compiled few times."""

from __future__ import annotations

from typing import NamedTuple


class CompiledSizes(NamedTuple):
    """The sizes of a generation batch."""

    budget: int  # tokens of a micro-batch
    longest: int  # tokens of the longest row

    def one_line(self, tokens: int) -> int:
        return rounded_tokens(tokens, self.budget)

    def padded(self, lines: int, width: int) -> tuple[int, int]:
        width = rounded_tokens(width, self.longest)
        return max(lines, self.budget // width), width


def rounded_tokens(tokens: int, budget: int) -> int:
    """Token count a compiled model is run at: the smallest of a few sizes that is >= tokens.

    base: the budget rounded up to {4, 5, 6, 7} * 2^e, e >= 6, so that base / 4 is a multiple of
    16. Sizes: base/4, base/2, 3 base/4, base; for an over-size unit multiples of base/2 beyond.

    Waste: less than base/4 up to base (a filler, 0 tokens: base/4), less than base/2 beyond.
    base < 5/4 * budget from 256 up, and = budget for 256, 320, 384, 448, 512, 640, 768, 896, ...
    """
    exponent = max(6, budget.bit_length() - 3)  # 4 * 2^e <= budget < 8 * 2^e from 256 up
    base = max(4, -(-budget // 2**exponent)) << exponent
    step = base // 4 if tokens <= base else base // 2
    return max(1, -(-tokens // step)) * step


def power_of_two(n: int) -> int:
    """The smallest power of two that is >= n, at least 1."""
    return 1 << max(n - 1, 0).bit_length()
