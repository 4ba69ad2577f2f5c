"""Which tokens of a line see which: lengths and parents in, the tensors of attention out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from rloo_kernels.transfer import to_device

from ..records import Segments, SharedRuns
from .compiled_sizes import power_of_two
from .tree_segments import NONE

Range = tuple[int, int]  # first and last + 1 of some tokens


def make_segments(
    lengths: Sequence[int],
    parents: Sequence[int],
    device: torch.device | str,
    *,
    pad_segments_to: int | None = None,
    pad_keys_to: int | None = None,
) -> Segments:
    """Segments of these lengths, in order, each of which continues another one (-1: none) and sees
    it and all that it sees.

    What continues a segment comes right after it, before anything else: depth first. For static
    shapes: `pad_segments_to` segments, the last ones empty, and `pad_keys_to` entries of key_index.
    Raises ValueError for another order, and for more segments or keys than are padded to.
    """
    if len(lengths) != len(parents):
        raise ValueError(f"{len(lengths)} lengths but {len(parents)} parents: give one for each.")
    bounds = [0, *accumulate(lengths)]
    paths = seen_ranges(bounds, parents)
    cu_k, index = [0], list[torch.Tensor]()
    for own, path in zip(pairwise(bounds), paths, strict=True):
        seen = joined([*path, own]) if own[0] < own[1] else []  # no queries, no keys
        index += [torch.arange(*part) for part in seen]
        cu_k.append(cu_k[-1] + sum(last - first for first, last in seen))
    missing = (pad_segments_to or len(lengths)) - len(lengths)
    missing_keys = (pad_keys_to or cu_k[-1]) - cu_k[-1]
    if missing < 0 or missing_keys < 0:
        raise ValueError(
            f"{len(lengths)} segments with {cu_k[-1]} keys do not fit pad_segments_to="
            f"{pad_segments_to} and pad_keys_to={pad_keys_to}: raise them."
        )
    keys = None
    if pad_keys_to is not None or cu_k != bounds:
        keys = to_device(torch.cat([*index, torch.zeros(missing_keys, dtype=torch.long)]), device)
    rows = (bounds + bounds[-1:] * missing, cu_k + cu_k[-1:] * missing)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in rows)
    max_q, max_k = (_longest(x) for x in (cu_q, cu_k))
    shared: tuple[SharedRuns, ...] = ()
    if keys is not None:
        shared = _shared_runs(bounds, paths, device, static=pad_keys_to is not None)
    cu_q_there, cu_k_there = to_device(cu_q, device), to_device(cu_k, device)
    parent = torch.tensor([*parents, *[NONE] * missing], dtype=torch.int32)
    return Segments(cu_q, parent, keys, cu_q_there, cu_k_there, max_q, max_k, shared)


def seen_ranges(bounds: Sequence[int], parents: Sequence[int]) -> list[list[Range]]:
    """The segments that each segment sees before its own tokens, as ranges of tokens, the first of
    its path first. Raises ValueError unless they come depth first."""
    paths: list[list[Range]] = []
    open_ones: list[int] = []  # the path to the segment before
    for s, parent in enumerate(parents):
        while open_ones and open_ones[-1] != parent:
            open_ones.pop()
        if bounds[s + 1] < bounds[s] or (parent != NONE and not open_ones):
            raise ValueError(
                f"segment {s}, tokens {bounds[s]}:{bounds[s + 1]}, has parent {parent}: the length "
                "must be >= 0, and the parent the segment before it, or what that one continues."
            )
        before = [] if parent == NONE else [*paths[parent], (bounds[parent], bounds[parent + 1])]
        paths.append(before)
        open_ones.append(s)
    return paths


def joined(ranges: Sequence[Range]) -> list[Range]:
    """The same tokens in fewer ranges, none of them empty."""
    found: list[Range] = []
    for first, last in ranges:
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], last)
        elif first < last:
            found.append((first, last))
    return found


def _shared_runs(
    bounds: Sequence[int],
    paths: Sequence[Sequence[Range]],
    device: torch.device | str,
    *,
    static: bool,
) -> tuple[SharedRuns, ...]:
    """Of every depth, the runs of neighbours that see one segment there.

    `static`: the next power of two of depths, and of runs in each, for few compiled sizes; kernels
    start blocks for every run that might be as long as the longest.
    """
    levels: list[list[tuple[int, int, int, int]]] = []
    for s, path in enumerate(paths):
        start, stop = bounds[s], bounds[s + 1]
        if start == stop:
            continue
        seen = [part for part in path if part[0] < part[1]]
        levels += [[] for _ in range(len(seen) - len(levels))]
        for runs, (first, last) in zip(levels, seen, strict=False):
            if runs and runs[-1][1:] == (start, first, last):
                runs[-1] = (runs[-1][0], stop, first, last)
            else:
                runs.append((start, stop, first, last))
    if static and levels:
        levels += [[] for _ in range(power_of_two(len(levels)) - len(levels))]
    return tuple(_runs_of_a_depth(runs, bounds[-1], device, static=static) for runs in levels)


def _runs_of_a_depth(
    runs: Sequence[tuple[int, int, int, int]], end: int, device: torch.device | str, *, static: bool
) -> SharedRuns:
    at = [(0, 0)]
    for start, stop, first, last in runs:  # depth first: what is seen comes in order too
        at += [(start, at[-1][1]), (start, first), (stop, last)]
    at += [(end, at[-1][1]), (end, end)]
    if static:
        at += at[-1:] * 3 * (max(4, power_of_two(len(runs))) - len(runs))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in zip(*at, strict=True))
    bounds_of_lengths = _longest(cu_q), _longest(cu_k)
    return SharedRuns(to_device(cu_q, device), to_device(cu_k, device), *bounds_of_lengths)


def _longest(bounds: torch.Tensor) -> int:
    """Longest segment, rounded up to a power of two, at least 128."""
    return max(128, 1 << (int(bounds.diff().max()) - 1).bit_length())
