"""Rows of token ids -> the segments of a line in which what they begin with alike comes once.

A row that another one begins with, as of two completions of which one is cut short, has no tokens
of its own: it reads the other's, here its host's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .prefix_tree import Branch, Shares, branches, first_row, key_of, shared

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
    order, cuts = shared([_key(row, number) for number, row in enumerate(rows)])
    places: dict[int, list[int]] = {}
    for place, row in enumerate(order):
        places.setdefault(rows[row].unit, []).append(place)
    for unit_places in places.values():
        prompt = rows[order[unit_places[0]]].prompt
        for place in range(unit_places[0], unit_places[-1]):
            cuts[place] = max(cuts[place], prompt)
    hosts = [0] * len(rows)
    kept: list[tuple[int, int]] = []  # (host, tokens after which the next one parts from it)
    for row, cut in zip(reversed(order), [0, *reversed(cuts)], strict=True):
        is_host = not kept or cut < len(rows[row].ids)
        if is_host:
            kept.append((row, cut))
        hosts[row] = kept[-1][0]
    kept.reverse()
    return hosts, Shares([row for row, _ in kept], [cut for _, cut in kept[:-1]])


def _key(row: TreeRow, number: int) -> bytes:
    if not row.alone:
        return key_of(row.ids)
    prompt, rest = [-1 - row.unit] * row.prompt, [-1 - number] * (len(row.ids) - row.prompt)
    return key_of(prompt + rest)  # ids that no token has, one for the unit and one for the row
