"""Kills runs that sample ahead at random moments, resumes them, and counts what each has trained.

    python -m tests.support.kill_ahead --kills 20 --seed 0

A run is right if in its steps, those that a kill undid left out, every prompt of the epoch was
trained exactly once, and the ledger of its last checkpoint says so. With dynamic sampling an epoch
is longer than the run: no prompt was trained twice, and as many as the steps took. Where nothing is
older than its step (max_staleness 0, by the loader and by the queue), its weights and metrics are
those of a run that was left alone, too. Exit status 1 if one is not.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from rloo_fast.checkpoint.files import INCOMPLETE, checkpoints
from rloo_fast.data.ledger import Fate
from rloo_fast.step import build, loaders
from tests.support.kill_resume import doing, is_exact, make_trainer, newest_step, start, wait

K, STEPS = 2, 24
PROMPTS = [f"w{i} w{j}" for i in range(8) for j in range(6)]  # an epoch: 2 in each step
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 4,
    "num_generations": K,
    "learning_rate": 1e-4,
    "beta": 0.0,
}
ENGINE = f"{Path(__file__).parent / 'copied_engine.py'}:SlowCopiedEngine"
# what is killed: (max_staleness, by the queue)
CASES = {
    "loader": (0, False),
    "N=0": (0, True),
    "N=1": (1, True),
    "N=4": (4, True),
    "N=1 dynamic": (1, True),
    "N=4 dynamic": (4, True),
}
# more than a run draws
MANY = [f"{prompt} w{i}" for prompt in PROMPTS for i in range(8)]
TRAINED = "trained.jsonl"


def slow_reward(completions: list[str], **_: Any) -> list[float]:
    time.sleep(0.01)
    return [text.count("w1") + 0.1 * len(text) for text in completions]


def odd_or_even(completions: list[str], **_: Any) -> list[float]:
    time.sleep(0.01)
    return [float(len(text.split()) % 2) for text in completions]


def make(output_dir: Path, case: str) -> Any:
    """A trainer that writes down what each of its steps trains."""
    staleness, by_the_queue = CASES[case]
    modules: tuple[Any, ...] = (build, loaders)
    for module in modules:
        module.samples_ahead = lambda args: by_the_queue
    given: dict[str, Any] = {"max_staleness": staleness}
    if staleness:
        given["rollout_engine"] = ENGINE
    prompts, reward = PROMPTS, slow_reward
    if is_dynamic(case):
        prompts, reward = MANY, odd_or_even
        given["dynamic_sampling"] = True
    rows = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer: Any = make_trainer(output_dir, reward, None, rows, None, **SETTINGS, **given)
    collect = trainer.source.next

    def noted(*args: Any) -> Any:
        collected = collect(*args)
        texts = trainer.processing_class.batch_decode(collected.batch.prompt_ids)
        line = {"step": trainer.state.global_step + 1, "prompts": texts}
        with (output_dir / TRAINED).open("a") as file:
            file.write(json.dumps(line) + "\n")
        return collected

    trainer.source.next = noted
    return trainer


def is_dynamic(case: str) -> bool:
    return case.endswith("dynamic")


def trained_once(output_dir: Path, case: str) -> str:
    """What is wrong with the prompts that were trained; "" if nothing is."""
    lines = [json.loads(line) for line in (output_dir / TRAINED).read_text().splitlines()]
    steps = {line["step"]: line["prompts"] for line in lines}  # the last word on each step
    counts = Counter(prompt for prompts in steps.values() for prompt in prompts)
    expected = list(counts) if is_dynamic(case) else PROMPTS
    wrong = {prompt: counts[prompt] for prompt in expected if counts[prompt] != K}
    if sorted(steps) != list(range(1, STEPS + 1)) or wrong or len(counts) != len(PROMPTS):
        return f"{len(wrong)} prompts not trained once, of {len(counts)}: {list(wrong)[:4]}"
    return ""


def ledger_counts(output_dir: Path) -> dict[str, int]:
    """Prompts by fate, in the newest checkpoint."""
    checkpoint = checkpoints(output_dir)[-1]
    state = torch.load(checkpoint / "rloo_state_0.pt", weights_only=True)["source"]
    if "stream" not in state:
        return {}
    fates = state["stream"]["ledger"]["fates"].tolist()
    return {fate.name: fates.count(fate) for fate in Fate}


def kill(process: Any, output_dir: Path, rng: random.Random, step_s: float) -> str:
    """SIGKILL at a random moment, every third time in a save."""
    begun = newest_step(output_dir)
    step = rng.randint(begun, STEPS - 1)
    wait(process, lambda: newest_step(output_dir) >= step - 1)
    if rng.random() < 1 / 3:
        wait(process, lambda: any(output_dir.glob(f"{INCOMPLETE}/*/checkpoint-*")))
        time.sleep(rng.uniform(0, step_s / 2))
    else:
        time.sleep(rng.uniform(0, step_s * 3))
    process.kill()
    process.join()
    return "had ended" if process.exitcode == 0 else doing(output_dir)


def killed_run(output_dir: Path, case: str, rng: random.Random, step_s: float) -> list[str]:
    """Train with a kill, or two; when they came, and the ledger that each resume began with."""
    moments = []
    for _ in range(rng.choice([1, 1, 2])):
        moment = kill(start(output_dir, {"case": case}, make), output_dir, rng, step_s)
        if checkpoints(output_dir) and (counts := ledger_counts(output_dir)):
            moment += "; " + ", ".join(f"{n} {name.lower()}" for name, n in counts.items() if n)
        moments.append(moment)
        if newest_step(output_dir) == STEPS:
            break
    finish(output_dir, case)
    return moments


def finish(output_dir: Path, case: str) -> None:
    process = start(output_dir, {"case": case}, make)
    process.join()
    assert process.exitcode == 0, process.exitcode


def verdict(output_dir: Path, case: str, reference: Path) -> str:
    """What is wrong with a run; "" if nothing is."""
    if problem := trained_once(output_dir, case):
        return problem
    counts = ledger_counts(output_dir)
    if is_dynamic(case):
        return "" if counts[Fate.TRAINED.name] == len(PROMPTS) else f"ledger {counts}"
    if counts and counts != {fate.name: (fate is Fate.TRAINED) * len(PROMPTS) for fate in Fate}:
        return f"ledger {counts}"
    if not CASES[case][0] and not is_exact(output_dir, reference):
        return "weights or metrics differ"
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill, resume, count.")
    parser.add_argument("--kills", type=int, default=20, help="runs with kills, of each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args(arguments)
    rng, num_wrong = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        for case in options.cases:
            reference, begin = Path(folder) / f"{case} reference", time.perf_counter()
            finish(reference, case)
            step_s = (time.perf_counter() - begin) / STEPS
            assert not verdict(reference, case, reference), "the run left alone is wrong"
            right = 0
            for run in range(1, options.kills + 1):
                output_dir = Path(folder) / f"{case} {run}"
                moments = killed_run(output_dir, case, rng, step_s)
                problem = verdict(output_dir, case, reference)
                right += not problem
                print(f"{case:11} {run:3}  {problem or 'right'}  [{' | '.join(moments)}]")
                sys.stdout.flush()
            print(f"{case}: {right} of {options.kills} right", flush=True)
            num_wrong += options.kills - right
    return int(num_wrong > 0)


if __name__ == "__main__":
    from tests.support.kill_ahead import main as main_of_module

    sys.exit(main_of_module())
