r"""Seconds to score completions that behave: in this process, and in processes with limits.

    python -m benchmarks.verifiers --completions 512 --json FILE

    accuracy        solutions of some 600 characters that end with \boxed{}, eight per gold answer
    reasoning_gym   answers to problems of five tasks, two of which call eval
    own             a function of one's own, two milliseconds or so per completion, groups of eight

Providers: `in process`, which nothing can end; `1 worker`, the same work in one other process, so
that what the way there costs is seen; `workers`, one per core, as a run has them. Gate: all give
the same rewards. Processes start in the warm-up round.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import random
from collections.abc import Callable
from typing import Any

import reasoning_gym
import torch

from benchmarks.common import harness
from benchmarks.common.harness import Row
from rloo_fast.rewards import load_reward_functions
from rloo_fast.verifiers import Verifiers, accuracy, gym_answers

Score = Callable[[], list[float | None]]
BASELINE = "in process"
K = 8
TASKS = ("basic_arithmetic", "countdown", "spell_backward", "polynomial_equations", "puzzle24")
ANSWERS = (
    lambda a, b, c: rf"\frac{{{a}}}{{{b}}}",
    lambda a, b, c: f"{a * b * c}",
    lambda a, b, c: rf"{a}\sqrt{{{b}}} + {c}",
    lambda a, b, c: f"{a}x^2 - {b}x + {c}",
    lambda a, b, c: f"({a}, {b}, {c})",
    lambda a, b, c: rf"[{a}, {a + b})",
    lambda a, b, c: f"{a}.{b}",
    lambda a, b, c: rf"\frac{{{a}\pi}}{{{b}}}",
    lambda a, b, c: rf"{a},{b},{a + c}",
    lambda a, b, c: rf"{a}{b}\%",
)
STEP = "We have ${a}x + {b} = {c}$, so that $x = \\frac{{{c} - {b}}}{{{a}}}$ holds in this case. "


def math_problems(count: int) -> list[tuple[str, str]]:
    """(gold, completion); half of the completions are right."""
    draw, pairs = random.Random(0), []
    for number in range(count):
        if number % K == 0:
            numbers = [draw.randint(2, 99) for _ in range(3)]
            gold = draw.choice(ANSWERS)(*numbers)
        steps = [
            STEP.format(a=draw.randint(2, 99), b=draw.randint(2, 99), c=draw.randint(2, 99))
            for _ in range(6)
        ]
        other = draw.choice(ANSWERS)(*(draw.randint(2, 99) for _ in range(3)))
        answer = gold if draw.random() < 0.5 else other
        pairs.append((gold, "".join(steps) + rf"The answer is $\boxed{{{answer}}}$."))
    return pairs


def gym_problems(count: int) -> list[tuple[str, dict[str, Any], str]]:
    """(task, entry, answer); half of the answers are right."""
    draw, problems = random.Random(0), []
    made = {t: reasoning_gym.create_dataset(t, size=-(-count // len(TASKS)), seed=0) for t in TASKS}
    for number in range(count):
        task = TASKS[number % len(TASKS)]
        entry = json.loads(json.dumps({**made[task][number // len(TASKS)], "config": {}}))
        problems.append((task, entry, entry["answer"] if draw.random() < 0.5 else "17"))
    return problems


def similarity(completions: list[str], target: list[str], **kwargs: Any) -> list[float]:
    """The function of one's own."""
    pairs = zip(completions, target, strict=True)
    return [difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs]


def asked(verifiers: Verifiers, questions: list[tuple[Any, ...]]) -> list[float | None]:
    futures = [verifiers.submit(*question) for question in questions]
    return [future.result()[0] for future in futures]


def own(processes: int, completions: list[str]) -> tuple[Score, Callable[[], None]]:
    rewards = load_reward_functions(similarity, processes=processes, timeout_s=60.0)
    groups = [list(range(i, min(i + K, len(completions)))) for i in range(0, len(completions), K)]
    columns = {"target": [completions[i // K * K] for i in range(len(completions))]}

    def score() -> list[float | None]:
        scoring = rewards.begin(
            ["?"] * len(completions), columns, groups, decode=lambda rows, _: texts(rows)
        )
        with scoring:
            for row in range(len(completions)):
                scoring.finished(row, [row])
            return scoring.end([[row] for row in range(len(completions))])[:, 0].tolist()

    def texts(rows: list[int]) -> list[str]:
        return [completions[row] for row in rows]

    return score, rewards.close


def measure(name: str, providers: dict[str, Score], args: argparse.Namespace) -> list[Row]:
    """A row per provider; one whose rewards differ is not timed."""
    shape = f"{args.completions} completions"
    rows = {p: Row(name, p, shape, "cpu", "-") for p in providers}
    wanted = providers[BASELINE]()
    for provider, score in providers.items():
        if score() != wanted:
            rows[provider].skipped = "wrong: other rewards than in process"
    passed = {p: score for p, score in providers.items() if rows[p].skipped is None}
    for p, seconds in harness.time_interleaved(
        passed, torch.device("cpu"), runs=args.runs, warmup=0
    ).items():
        rows[p].set_times(seconds)
    return list(rows.values())


def verified(verifier: str, here: Callable[..., Any], questions: list, args: Any) -> list[Row]:
    one, per_core = Verifiers(verifier, count=1), Verifiers(verifier)
    try:
        return measure(
            verifier,
            {
                BASELINE: lambda: [here(*question)[0] for question in questions],
                "1 worker": functools.partial(asked, one, questions),
                "workers": functools.partial(asked, per_core, questions),
            },
            args,
        )
    finally:
        one.close()
        per_core.close()


def run(args: argparse.Namespace) -> list[Row]:
    math = math_problems(args.completions)
    rows = verified("accuracy", accuracy.verify, math, args)
    rows += verified("reasoning_gym", gym_answers.verify, gym_problems(args.completions), args)
    texts = [completion for _, completion in math]
    made = {BASELINE: own(0, texts), "1 worker": own(1, texts), "workers": own(2, texts)}
    try:
        return rows + measure("own", {name: score for name, (score, _) in made.items()}, args)
    finally:
        for _, close in made.values():
            close()


def main(argv: list[str] | None = None) -> int:
    """0 if all give the same rewards."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verifiers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--completions", type=int, default=512, help="scored per call")
    add("--runs", type=int, default=5, help="timed rounds")
    add("--json", help="write env and rows here")
    args = parser.parse_args(argv)
    if min(args.completions, args.runs) < 1:
        parser.error("--completions and --runs must be >= 1.")
    env = harness.environment()
    print(json.dumps(env))
    rows = run(args)
    print(harness.format_table(rows, baseline=BASELINE), flush=True)
    if args.json:
        harness.write_json(args.json, env, rows)
    return int(any(row.skipped for row in rows))
