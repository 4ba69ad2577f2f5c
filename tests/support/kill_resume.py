"""Kills training runs at random moments, resumes them, and compares each with a run left alone.

    python -m tests.support.kill_resume --runs 20 --seed 0 [--case dynamic]

A run is exact if its final weights and every line of metrics.jsonl, but for times, are those of the
run that was left alone; with a ledger of prompts, if that is the same, and no prompt was trained or
replaced twice. Exit status 1 if one is not. The trainer of the tests is made here.
"""

from __future__ import annotations

import argparse
import gc
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
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.checkpoint.files import INCOMPLETE, checkpoints, step_of
from rloo_fast.data.ledger import FINAL, Fate
from rloo_fast.records import SampledGroup
from rloo_fast.reports.metric_names import is_timing
from tests.support.launch import forks
from tests.support.tiny import make_model, make_tokenizer

ROWS = [{"prompt": f"w{i} w{i + 1} w{i + 2}"[: 5 + i % 7], "n": i} for i in range(20)]
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 6,
    "max_steps": 6,
    "logging_steps": 1,
    "save_steps": 3,
    "learning_rate": 1e-3,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "gradient_checkpointing": False,
}
KILLED: dict[str, Any] = {
    "max_steps": 12,
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 3,
    "num_iterations": 2,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "sync_ref_model": True,
    "ref_model_sync_steps": 4,
    "warmup_steps": 3,
}


def random_reward(completions: list[str], **_: Any) -> list[float]:
    """Draws from Python's global random numbers, as reward functions do that should not."""
    return [text.count("w1") + random.random() for text in completions]


def slow_reward(completions: list[str], **columns: Any) -> list[float]:
    time.sleep(0.02)  # rollouts, updates and saves take about as long as each other
    return random_reward(completions, **columns)


def slow_coin(completions: list[str], **_: Any) -> list[float]:
    """Mostly wrong, so that half of the groups have no signal."""
    time.sleep(0.01)
    return [float(random.random() < 0.3) for _ in completions]


def is_not_tiny(group: SampledGroup) -> bool:
    """A rollout_filter."""
    return max(group.lengths) > 1


# --case: settings of its runs
CASES: dict[str, dict[str, Any]] = {
    "plain": {**KILLED, "reward": slow_reward},
    "dynamic": {
        **KILLED,
        "reward": slow_coin,
        "dynamic_sampling": True,
        "curriculum": 0.5,
        "rollout_filter": "tests.support.kill_resume:is_not_tiny",
    },
}


def make_trainer(
    output_dir: Path,
    reward: Any = random_reward,
    model: Any = None,
    train_dataset: Any = None,
    peft_config: Any = None,
    **settings: Any,
) -> RLOOTrainer:
    trainer = RLOOTrainer(
        model or make_model(),
        reward,
        RLOOConfig(str(output_dir), **{**DEFAULTS, **settings}),
        train_dataset or Dataset.from_list(ROWS),
        Dataset.from_list(ROWS[:5]),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in rows]


def metrics_of(output_dir: Path) -> list[dict[str, Any]]:
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return without_times([json.loads(line) for line in lines])


# Runs in processes of their own


def train(output_dir: Path, settings: dict[str, Any], resume: bool, make: Any = make_trainer):
    """A whole run, as a training script would do it; the model ends up in <output_dir>/final."""
    disable_progress_bar()
    torch.set_num_threads(1)
    gc.freeze()  # every train() begins with a collection, which then spares what was imported
    trainer = make(output_dir, **settings)
    note_fates(trainer, output_dir)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output_dir / "final"))
    if (stream := getattr(trainer.source, "stream", None)) is not None:
        state = {"fates": stream.ledger.state_dict()["fates"].tolist()}
        (output_dir / "final/ledger.json").write_text(json.dumps(state))


def note_fates(trainer: RLOOTrainer, output_dir: Path) -> None:
    """A line in fates.jsonl for what becomes of prompts: after how many steps, what, their numbers;
    and for the start of a process, the step it resumes."""
    stream = getattr(trainer.source, "stream", None)
    if stream is None:
        return
    mark, path = stream.mark, output_dir / "fates.jsonl"

    def write(**line: Any) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def noted(numbers: Any, fate: Fate) -> None:
        numbers = list(numbers)
        mark(numbers, fate)
        write(step=trainer.state.global_step, fate=int(fate), numbers=numbers)

    stream.mark = noted
    write(resumes=newest_step(output_dir))


def start(output_dir: Path, settings: dict[str, Any], make: Any = make_trainer) -> Any:
    """A process that trains, from the newest checkpoint if there is one."""
    resume = bool(checkpoints(output_dir))
    process = forks().Process(target=train, args=(output_dir, settings, resume, make))
    process.start()
    return process


def is_exact(output_dir: Path, reference: Path) -> bool:
    runs = (output_dir, reference)
    weights = [(run / "final/model.safetensors").read_bytes() for run in runs]
    ledgers = [run / "final/ledger.json" for run in runs]
    if ledgers[1].is_file() and (
        ledgers[0].read_text() != ledgers[1].read_text() or not trained_once(output_dir)
    ):
        return False
    return weights[0] == weights[1] and metrics_of(output_dir) == metrics_of(reference)


def trained_once(output_dir: Path) -> bool:
    """Whether the steps that the final weights come from trained or replaced every prompt once, as
    the ledger says. What a killed process did after the step that was resumed is undone."""
    done: list[dict[str, Any]] = []
    for line in map(json.loads, (output_dir / "fates.jsonl").read_text().splitlines()):
        if "resumes" in line:
            done = [before for before in done if before["step"] < line["resumes"]]
        elif Fate(line["fate"]) in FINAL:
            done.append(line)
    counted = Counter((n, line["fate"]) for line in done for n in line["numbers"])
    fates = json.loads((output_dir / "final/ledger.json").read_text())["fates"]
    expected = {(n, fate): 1 for n, fate in enumerate(fates) if Fate(fate) in FINAL}
    return dict(counted) == expected


# Killing


def newest_step(output_dir: Path) -> int:
    found = checkpoints(output_dir)
    return step_of(found[-1]) if found else 0


def wait(process: Any, condition: Any) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.0002)


def doing(output_dir: Path) -> str:
    """What a killed process was doing, from what it left."""
    left = output_dir / INCOMPLETE
    for path in sorted(left.glob("*/*")):
        verb = "saving" if step_of(path) >= 0 else "deleting"
        return f"{verb}, {path.name} has {len(list(path.iterdir()))} files"
    step = newest_step(output_dir)
    return f"after checkpoint-{step}" if step else "before a checkpoint"


def kill(process: Any, output_dir: Path, rng: random.Random, step_s: float) -> str:
    """SIGKILL at a random moment, every second time in a save. Returns when and during what."""
    begin, begun_at, last = time.perf_counter(), newest_step(output_dir), KILLED["max_steps"]
    step = rng.randint(begun_at, last)
    wait(process, lambda: newest_step(output_dir) >= step)
    if rng.random() < 0.5 and step < last:
        wait(process, lambda: any(output_dir.glob(f"{INCOMPLETE}/*/checkpoint-{step + 1}")))
        time.sleep(rng.uniform(0, step_s / 2))
    else:  # before the first step as well as in or between steps
        time.sleep(rng.uniform(0, step_s * (1 if step > begun_at else 5)))
    process.kill()
    process.join()
    seconds = time.perf_counter() - begin
    what = "had ended" if process.exitcode == 0 else doing(output_dir)
    return f"{seconds:.2f} s, {what}"


def killed_run(
    output_dir: Path, settings: dict[str, Any], rng: random.Random, step_s: float
) -> list[tuple[str, int]]:
    """Train with one to three kills. Returns each, with the step that was resumed from."""
    kills = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        moment = kill(start(output_dir, settings), output_dir, rng, step_s)
        kills.append((moment, newest_step(output_dir)))
        if newest_step(output_dir) == KILLED["max_steps"]:
            break
    process = start(output_dir, settings)
    process.join()
    assert process.exitcode == 0, process.exitcode
    return kills


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill, resume, compare.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", choices=CASES, default="plain")
    options = parser.parse_args(arguments)
    rng, settings = random.Random(options.seed), CASES[options.case]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("warm-up", "reference"):  # the first one also waits for the imports
            begin = time.perf_counter()
            process = start(Path(folder) / name, settings)
            process.join()
            step_s = (time.perf_counter() - begin) / KILLED["max_steps"]
        num_exact = 0
        print(f"{'run':>3}  {'killed at':48}  {'resumed from':>12}  exact")
        for run in range(1, options.runs + 1):
            output_dir = Path(folder) / str(run)
            kills = killed_run(output_dir, settings, rng, step_s)
            exact = is_exact(output_dir, Path(folder) / "reference")
            num_exact += exact
            for i, (moment, step) in enumerate(kills):
                number, end = run if i == 0 else "", "yes" if exact else "NO"
                end = end if i == len(kills) - 1 else ""
                print(f"{number:>3}  {moment:48}  {step or 'scratch':>12}  {end}".rstrip())
            sys.stdout.flush()
        if (ledger := Path(folder) / "reference/final/ledger.json").is_file():
            counts = Counter(json.loads(ledger.read_text())["fates"])
            print("prompts:", ", ".join(f"{counts[f]} {f.name.lower()}" for f in Fate if counts[f]))
    print(f"{num_exact} exact resumes of {options.runs}")
    return int(num_exact != options.runs)


if __name__ == "__main__":
    from tests.support.kill_resume import (
        main as main_of_module,  # processes run what has an importable name
    )

    sys.exit(main_of_module())
