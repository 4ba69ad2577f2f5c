"""Which tokens rows have in common: a tree over token ids, found by sorting.

Rows in the order of their ids have what two of them share between all neighbours from the one to
the other, so the tree is in one number per pair of neighbours: the tokens after which they part. A
branch is where these are fewer than on both sides.

Branches are put at every EVERY-th position, just before the tokens that differ, so that no segment
is a token or two long, and at the end of a group's prompt. So two rows share a number of tokens
that does not depend on what else is in the tree: a plan may count it group by group. And a tree
never has more tokens than one that parts a token early, as TRL's does: a row loses two tokens at
most where it leaves the others, and its last token is not run.
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

    @property
    def total(self) -> int:
        """Tokens that a row has in common with the rows before it, over all rows."""
        return sum(self.cuts)


@dataclass(slots=True)
class Branch:
    """Rows that share `depth` tokens: `children` are row numbers, and branches of longer shares."""

    depth: int
    first: int  # the lowest of the rows' numbers
    children: list[Branch | int] = field(default_factory=list["Branch | int"])


def shared(keys: Sequence[bytes], *, behind: int = 0, ends: bool = True) -> Shares:
    """What the rows with these keys share, behind `behind` tokens that all have in common.

    `ends`: a row ends with its key. One that the next one begins with needs no branch then: its
    tokens are the other's.
    """
    order = sorted(range(len(keys)), key=keys.__getitem__)
    cuts: list[int] = []
    for a, b in pairwise(order):
        if ends and keys[b].startswith(keys[a]):
            cuts.append(behind + len(keys[a]) // _TOKEN)
        else:
            common = behind + _num_common(keys[a], keys[b])
            cuts.append(max(behind, common - common % EVERY))
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
