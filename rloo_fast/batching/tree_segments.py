"""Rows of token ids -> the segments of a line in which what they begin with alike comes once.

A row that another one begins with, as of two completions of which one is cut short, has no tokens
of its own: it reads the other's, here its host's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from .prefix_tree import Branch, Shares, branches, first_row, in_order, key_of, parted

NONE = -1  # the parent of a segment that continues no other


class TreeRow(NamedTuple):
    ids: list[int]  # prompt and completion
    prompt: int  # tokens of the prompt
    unit: int  # rows of one have one prompt, which they share whatever its length
    alone: bool = False  # they share it, and nothing else with any row


class TreeSegment(NamedTuple):
    """Tokens start:stop of a row, and of all others that run through it."""

    row: int
    start: int
    stop: int
    parent: int
    lengths: list[int]  # tokens that each row through it has of it

    def weights(self) -> list[int]:
        """The number of rows that each token stands for."""
        size = self.stop - self.start
        weights = [len(self.lengths)] * size
        for length in self.lengths:
            for t in range(length, size):
                weights[t] -= 1
        return weights


def tree_segments(rows: Sequence[TreeRow]) -> tuple[list[TreeSegment], list[list[int]]]:
    """(segments, depth first; the numbers of those that each row runs through, in order).

    Rows come in the order given wherever they part. A row alone behind its prompt, or behind what
    its prompt begins with, has a segment for each, as rows of a group have.
    """
    if not rows:
        return [], []
    segments: list[TreeSegment] = []
    paths: dict[int, list[int]] = {}  # of hosts
    hosts, shares = _hosts(rows)
    left: list[tuple[Branch | int, int, list[int]]] = [(branches(shares)[-1], 0, [])]
    while left:
        node, start, path = left.pop()
        row = first_row(node)
        ends = [node.depth] if isinstance(node, Branch) else _ends(rows[row], start)
        for stop in ends:
            if start < stop:
                segments.append(TreeSegment(row, start, stop, path[-1] if path else NONE, []))
                path, start = [*path, len(segments) - 1], stop
        if isinstance(node, Branch):
            children = sorted(node.children, key=first_row, reverse=True)
            left += [(child, start, path) for child in children]
        else:
            paths[row] = path
    found: list[list[int]] = []
    for row, host in zip(rows, hosts, strict=True):
        found.append([s for s in paths[host] if segments[s].start < len(row.ids)])
        for s in found[-1]:
            segment = segments[s]
            segment.lengths.append(min(len(row.ids), segment.stop) - segment.start)
    return segments, found


def _ends(row: TreeRow, start: int) -> list[int]:
    return [row.prompt, len(row.ids)] if start < row.prompt < len(row.ids) else [len(row.ids)]


def _hosts(rows: Sequence[TreeRow]) -> tuple[list[int], Shares]:
    """(the row whose tokens each row runs: its own, or those of one that begins with it; what these
    rows share)"""
    order, common = in_order([_key(row, number) for number, row in enumerate(rows)])
    cuts = [
        _parts_after(rows[a], rows[b], n) for (a, b), n in zip(pairwise(order), common, strict=True)
    ]
    last_place: dict[int, int] = {}
    for place, row in enumerate(order):
        before, prompt = last_place.get(rows[row].unit, place), rows[row].prompt
        if before < place:  # rows of others may lie between two of a unit
            least = prompt + parted(min(common[before:place]) - prompt)
            for between in range(before, place):
                cuts[between] = max(cuts[between], least)
        last_place[rows[row].unit] = place
    hosts = [0] * len(rows)
    kept: list[tuple[int, int]] = []  # (host, tokens after which the next one parts from it)
    for row, cut in zip(reversed(order), [0, *reversed(cuts)], strict=True):
        is_host = not kept or cut < len(rows[row].ids)
        if is_host:
            kept.append((row, cut))
        hosts[row] = kept[-1][0]
    kept.reverse()
    return hosts, Shares([row for row, _ in kept], [cut for _, cut in kept[:-1]])


def _parts_after(row: TreeRow, next_row: TreeRow, common: int) -> int:
    """Tokens after which the next row parts from one that it begins like."""
    if common == len(row.ids):
        return common
    behind = row.prompt if row.unit == next_row.unit else 0
    return behind + parted(common - behind)


def _key(row: TreeRow, number: int) -> bytes:
    if not row.alone:
        return key_of(row.ids)
    prompt, rest = [-1 - row.unit] * row.prompt, [-1 - number] * (len(row.ids) - row.prompt)
    return key_of(prompt + rest)  # ids that no token has, one for the unit and one for the row
