"""One RLOO update of a model split over processes, ours beside TRL's under the same engine.

    python -m benchmarks.sharded --json FILE

Engines: one process; two gloo processes, a thread each, with DDP, FSDP2 and DeepSpeed ZeRO-3 (set
up for CPUs as the tests do). All train on the same completions, which are given; the update is
timed as in `benchmarks.step`, and counts as long as its slowest process takes. On a CPU this says
what the engines' own work costs (gathering, splitting, waiting), not how they scale on GPUs.

TRL's head is that of a GPU by default (`step_providers`): on a CPU it also scores the prompts,
which is most of its time there; `--trainers trl,ours` has it as it is.

Gate: loss and gradient norm of the first update must be those of the first provider. Policy and
reference are still the same then, so that KL is 0: `benchmarks.step` and the tests look at it. The
trainers take turns, a b | b a | a b ..., in processes of their own that are there at the same time;
one engine is measured after the other.

`extra MiB`: most resident memory of the process with the most, in one update, above what it had
when all libraries were imported: weights, gradients, optimizer state, reference and activations.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils import logging

from benchmarks.common import harness
from benchmarks.common import models as step_models
from benchmarks.common.harness import Row
from benchmarks.common.models import MODELS, SHAPES
from benchmarks.step.providers import Settings
from benchmarks.step.run import paired_ratios, take_turns

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = {"one": 1, "ddp": 2, "fsdp2": 2, "zero3": 2}
TRAINERS = ("trl_gpu_head", "ours", "trl")  # of step_providers.LADDER
TOLERANCE = 1e-3  # relative


class Failed(Exception):
    """What a process said last."""


class Group:
    """The processes of one trainer under one engine; each waits until it is told to step."""

    def __init__(self, trainer: str, engine: str, settings: Settings, log: Path):
        told = {"trainer": trainer, "engine": engine, "settings": asdict(settings)}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        with log.open("w") as stderr:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.sharded.worker", json.dumps(told)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    cwd=ROOT,
                    env=_environment(rank, PROCESSES[engine], port),
                )
                for rank in range(PROCESSES[engine])
            ]

    def ask(self, word: str) -> list[dict[str, Any]]:
        """Every process' reply to one step. Raises Failed where one has ended."""
        try:
            for process in self.processes:
                print(word, file=process.stdin, flush=True)
            return [json.loads(process.stdout.readline()) for process in self.processes]  # pyright: ignore
        except (BrokenPipeError, json.JSONDecodeError):
            raise Failed(_last_error(self.log.read_text())) from None

    def seconds(self) -> float:
        return max(reply["seconds"] for reply in self.ask("step"))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if world > 1:
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return env


def _last_error(text: str) -> str:
    """The sentence of the process that failed first, or the last line."""
    lines = [re.sub(r"^\[rank\d\]: ", "", line) for line in text.strip().splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (errors or lines[-1:] or ["no message"])[0][:200]


def gate(row: Row, group: Group, baseline: dict[str, float] | None) -> dict[str, float] | None:
    """The first update's figures where they are right; the row says why not."""
    try:
        found = group.ask("step")[0]
    except Failed as reason:
        row.skipped = f"failed: {reason}"
        return None
    base = baseline or found
    scale = {"loss": max(abs(base["loss"]), base["reward_std"]), "grad_norm": base["grad_norm"]}
    errors = {name: abs(found[name] - base[name]) / size for name, size in scale.items()}
    if not all(error <= TOLERANCE for error in errors.values()):  # nan: refused
        told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        row.skipped = f"wrong: relative differences above {TOLERANCE:g}: {told}"
        return None
    row.error_vs_reference = max(errors.values())
    row.add_note(f"{PROCESSES[row.provider.split()[1]]} x {found['threads']} thread")
    return found


def measure_engine(
    engine: str, settings: Settings, rows: Mapping[str, Row], runs: int, base: Any, log: Path
) -> Any:
    """Fill the rows of ours and trl under one engine; returns the gate's baseline."""
    with ExitStack() as stack:
        groups: dict[str, Group] = {}
        for trainer, row in rows.items():
            group = Group(trainer, engine, settings, log.with_suffix(f".{trainer}"))
            stack.callback(group.close)
            found = gate(row, group, base)
            base = base or found
            if found is not None:
                groups[trainer] = group
        steps = {f"{name} {engine}": group.seconds for name, group in groups.items()}
        seconds = take_turns(steps, runs, "update")
        for name, group in groups.items():
            rows[name].set_times(seconds[f"{name} {engine}"])
            rows[name].peak_extra_mem_mib = max(r["extra_mib"] for r in group.ask("memory"))
            rows[name].tokens = sum(settings.shape.lengths())
    for name in groups if "ours" in groups else ():
        if name != "ours":
            ratios = paired_ratios(seconds[f"{name} {engine}"], seconds[f"ours {engine}"])
            rows["ours"].add_note(
                f"{name} / ours {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} .. {max(ratios):.2f} over {len(ratios)} pairs)"
            )
    return base


def run(args: argparse.Namespace, folder: Path) -> list[Row]:
    shape = SHAPES[args.shape].with_sizes(None, args.prompts)
    told = (
        f"{shape.name} {args.model} P={shape.num_prompts} K={shape.num_generations} "
        f"prompt={shape.prompt} limit={shape.limit}"
    )
    model_folder = folder / "model"
    step_models.save_model(args.model, model_folder)
    rows: list[Row] = []
    base = None
    for engine in args.engines:
        settings = Settings(
            model_folder=str(model_folder),
            output_folder=str(folder / "out"),
            shape_name=args.shape,
            num_generations=shape.num_generations,
            num_prompts=shape.num_prompts,
            device="cpu",
            dtype="float32",
            rows_per_micro_batch=shape.num_rows // PROCESSES[engine],
            beta=args.beta,
            gradient_checkpointing=False,
        )
        new = {t: Row("sharded", f"{t} {engine}", told, "cpu", "float32") for t in args.trainers}
        base = measure_engine(engine, settings, new, args.runs, base, folder / engine)
        rows += new.values()
    return rows


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="tldr")
    add("--model", choices=MODELS, default="pythia-14m", help="from its config, random weights")
    add("--engines", default=",".join(PROCESSES), help="[all]")
    add("--trainers", default="trl_gpu_head,ours", help=f"of {', '.join(TRAINERS)}")
    add("--prompts", type=int, default=2, help="P per step, of all processes")
    add("--beta", type=float, default=0.05)
    add("--runs", type=int, default=5, help="timed pairs")
    add("--json", help="write env and rows here")
    args = parser.parse_args(argv)
    args.engines, args.trainers = args.engines.split(","), args.trainers.split(",")
    for option, known in (("engines", PROCESSES), ("trainers", TRAINERS)):
        if unknown := [name for name in getattr(args, option) if name not in known]:
            parser.error(f"--{option} are {', '.join(known)}; got {', '.join(unknown)}.")
    if args.runs < 1 or args.prompts < 2 or args.prompts % 2:
        parser.error(
            f"--runs must be >= 1 and --prompts even, as two processes share them; got "
            f"{args.runs}, {args.prompts}."
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """0 if every provider that could run passed the gate."""
    args, env = parse_arguments(argv), harness.environment()
    logging.disable_progress_bar()
    print(json.dumps(env))
    with tempfile.TemporaryDirectory() as folder:
        rows = run(args, Path(folder))
    baseline = f"{args.trainers[0]} {args.engines[0]}"
    print(harness.format_table(rows, baseline=baseline), flush=True)
    if args.json:
        harness.write_json(args.json, env, rows)
    return int(any((row.skipped or "").startswith(("wrong", "failed")) for row in rows))
