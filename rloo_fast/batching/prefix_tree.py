"""Which tokens rows have in common: a tree over token ids, found by sorting.

Rows in the order of their ids have what two of them share between all neighbours from the one to
the other, so the tree is in one number per pair of neighbours: the tokens after which they part. A
branch is where these are fewer than on both sides.

Branches are put at every EVERY-th position before the tokens that differ, counted from the end of
the prompt where the rows are of one group, and at that end: no branch for a token or two. So two
rows share tokens, whatever else is in the tree, and a plan may count them group by group. And a
tree never has more tokens than one that parts a token early, as TRL's does: a row loses two tokens
at most where it leaves the others, and its last token is not run.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

EVERY = 3

_TOKEN = array("i").itemsize


def key_of(ids: Sequence[int]) -> bytes:
    """Token ids as bytes, which are sorted and compared without Python: equal ones are
    neighbours."""
    return array("i", ids).tobytes()


class Shares(NamedTuple):
    """Rows in the order of their ids, and the tokens after which each parts from the next one."""

    order: list[int]
    cuts: list[int]


@dataclass(slots=True)
class Branch:
    """Rows that share `depth` tokens: `children` are row numbers, and branches of longer shares."""

    depth: int
    first: int  # the lowest of the rows' numbers
    children: list[Branch | int] = field(default_factory=list["Branch | int"])


def in_order(keys: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """(row numbers by their keys, tokens that each one's begins with like the next one's)."""
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return order, [_num_common(keys[a], keys[b]) for a, b in pairwise(order)]


def num_tokens(key: bytes) -> int:
    return len(key) // _TOKEN


def parted(common: int) -> int:
    """Tokens that two rows share that have these in common, from where branches are counted."""
    return common - common % EVERY


def shared(keys: Sequence[bytes], *, behind: int = 0, ends: bool = True) -> Shares:
    """What the rows with these keys share, behind `behind` tokens that all have in common, from
    which branches are counted.

    `ends`: a row ends with its key. One that the next one begins with needs no branch then: its
    tokens are the other's.
    """
    order, common = in_order(keys)
    cuts = [
        behind + (n if ends and n == num_tokens(keys[row]) else parted(n))
        for row, n in zip(order, common, strict=False)
    ]
    return Shares(order, cuts)


def first_row(child: Branch | int) -> int:
    return child.first if isinstance(child, Branch) else child


def branches(shares: Shares, root: int = 0) -> list[Branch]:
    """Every branch, children before their parents; the last one has depth `root`, above all."""
    closed: list[Branch] = []
    open_ones = [Branch(root, shares.order[0])]
    for row, cut in zip(shares.order, [*shares.cuts, root], strict=True):
        child: Branch | int = row
        while open_ones[-1].depth > cut:
            _add(open_ones[-1], child)
            child = open_ones.pop()
            closed.append(child)
        if open_ones[-1].depth < cut:
            open_ones.append(Branch(cut, row))
        _add(open_ones[-1], child)
    return [*closed, *open_ones]


def _add(branch: Branch, child: Branch | int) -> None:
    branch.children.append(child)
    branch.first = min(branch.first, first_row(child))


def _num_common(a: bytes, b: bytes) -> int:
    """Tokens that both begin with: doubling steps, then halving ones, each one comparison."""
    low, most = 0, min(len(a), len(b)) // _TOKEN
    step = 4
    while low < most:
        high = min(low + step, most)
        if a[low * _TOKEN : high * _TOKEN] != b[low * _TOKEN : high * _TOKEN]:
            break
        low, step = high, 2 * step
    else:
        return low
    while low < high:  # they differ in low:high
        middle = (low + high + 1) // 2
        if a[low * _TOKEN : middle * _TOKEN] == b[low * _TOKEN : middle * _TOKEN]:
            low = middle
        else:
            high = middle - 1
    return low
