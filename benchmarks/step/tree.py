"""What it costs to find the tokens that rows share: 512 rows of 2,000 tokens, in Python.

    python -m benchmarks.step.tree --json FILE

    sharing     ours, once a step: what groups and completions share, for the planner
    lines       ours, once a micro-batch: token ids -> the tree's line, here of all rows at once
    trl         TRL's tree of single tokens of the same rows, and its row of tokens

Rows: P prompts of 1,500 tokens of which all begin with the same 1,000, K completions of 500 each.
Seconds of processor time, of calls in turn.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import torch

from benchmarks.common import harness
from benchmarks.common.harness import Row
from rloo_fast.batching.layouts import LAYOUTS, UnitIds

SYSTEM, PROMPT, COMPLETION, VOCABULARY = 1000, 1500, 500, 150_000


def make_units(num_groups: int, k: int) -> list[UnitIds]:
    draw = random.Random(0)
    ids = lambda n: [draw.randrange(VOCABULARY) for _ in range(n)]  # noqa: E731
    system = ids(SYSTEM)
    return [
        UnitIds(
            system + ids(PROMPT - SYSTEM),
            [ids(COMPLETION) for _ in range(k)],
            [range(COMPLETION + 1)] * k,
        )
        for _ in range(num_groups)
    ]


def trl_packing(units: list[UnitIds]) -> Callable[[], int]:
    from trl.experimental.async_grpo.packing import TreeRow

    samples = []
    for group, unit in enumerate(units):
        for ids in unit.completions:
            mask = torch.tensor([0] * len(unit.prompt) + [1] * len(ids))
            samples.append({
                "input_ids": torch.tensor(unit.prompt + ids), "completion_mask": mask,
                "old_log_probs": torch.zeros(len(mask)), "advantage": 0.0, "group_id": group,
            })  # fmt: skip

    def run() -> int:
        row = TreeRow()
        for sample in samples:
            row.add(sample)
        return len(row.pack()["input_ids"])

    return run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step.tree", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", help="write env and rows here")
    args = parser.parse_args(argv)
    units = make_units(args.groups, args.num_generations)
    layout = LAYOUTS["shared_prefix"]

    def sharing() -> int:
        found = layout.sharing([u.prompt for u in units], [u.completions for u in units])
        assert found is not None
        return sum(
            found.group_tokens(g, len(u.prompt), [len(c) for c in u.completions])
            for g, u in enumerate(units)
        ) - sum(found.groups.cuts)

    def lines() -> int:
        made = layout.lines(units, pad_token_id=0, multiple_of=1, sizes=None)
        return len(made.input_ids[0])

    calls = {"sharing": sharing, "lines": lines, "trl": trl_packing(units)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    tokens: dict[str, int] = {}
    for _ in range(args.runs):
        for name, call in calls.items():
            start = time.process_time()
            tokens[name] = call()
            seconds[name].append(time.process_time() - start)
    told = f"{args.groups} groups of {args.num_generations}, {PROMPT} + {COMPLETION} tokens"
    rows = []
    for name, times in seconds.items():
        row = Row("tree", name, told, "cpu", "int")
        row.set_times(times)
        row.tokens = tokens[name]
        rows.append(row)
    env = harness.environment()
    print(harness.format_table(rows, baseline="trl"))
    if args.json:
        harness.write_json(args.json, env, rows)


if __name__ == "__main__":
    main()
