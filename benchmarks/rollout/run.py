"""Completion tokens per second of K samples of P prompts: our engines beside TRL's way.

    python -m benchmarks.rollout --engines hf,vllm,trl-hf --model pythia-70m --json FILE

Engines, shapes and what is equal for all: `rollout_providers`. On a CPU, in fp32.

Gate: every completion has the shape's number of tokens; every log-prob that an engine gives is
within 1e-4 of a full forward of the model; and the model ran with the threads that were asked for.
It is the warm-up too. Then the engines take turns in one process; ratios are taken round by round.
`tokens` are the completion tokens, the same for all; what the model ran for them, prompts and
padding included, is in the note. Starting vLLM, with its first weights, is a row of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common import harness, memory
from benchmarks.common import models as step_models
from benchmarks.common.harness import Row
from benchmarks.rollout.providers import (
    MAKERS,
    SHAPES,
    Engines,
    Provider,
    Settings,
    Unavailable,
    Watched,
    largest_error,
)
from benchmarks.step.run import paired_ratios
from rloo_fast.records import Rollout

TOLERANCE = 1e-4  # of a log-prob
BASELINE = "trl-hf"


def gate(engines: Engines, rows: Mapping[str, Row]) -> dict[str, Provider]:
    """One rollout of each engine, checked; returns those that are right."""
    passed: dict[str, Provider] = {}
    for name, row in rows.items():
        try:
            provider = engines.make(name)
            seen = Watched(provider.model)
            rollout = provider.generate()
            seen.stop()
            row.skipped = fault(engines, rollout, seen, row)
        except Unavailable as reason:
            row.skipped = str(reason)
        except Exception as error:  # it gets a reason, not a figure
            row.skipped = failure(error)
        if row.skipped is None:
            passed[name] = provider
            row.add_note(f"{seen}, {seen.threads} thread{'s'[: seen.threads != 1]}")
            if provider.note:
                row.add_note(provider.note)
    return passed


def fault(engines: Engines, rollout: Rollout, seen: Watched, row: Row) -> str | None:
    """What is wrong with an engine's rollout, None if nothing; fills the row's error."""
    shape = engines.settings.shape
    lengths = sorted({len(ids) for ids in rollout.completion_ids})
    if len(rollout.completion_ids) != shape.num_rows or lengths != [shape.limit]:
        found = f"{len(rollout.completion_ids)} completions of {lengths} tokens"
        return f"wrong: {found}, not {shape.num_rows} of {shape.limit}"
    if seen.threads != engines.threads:
        return f"wrong: ran with {seen.threads} threads, not {engines.threads}"
    if rollout.logps is None:
        row.add_note("gives no log-probs")
        return None
    error = largest_error(engines.model, engines.rows, rollout)
    if not error <= TOLERANCE:  # nan: refused
        return f"wrong: log-probs off by {error:.1e}"
    row.error_vs_reference = error
    return None


def failure(error: Exception) -> str:
    sentence = (str(error).strip().splitlines() or ["no message"])[0][:200]
    return f"failed: {type(error).__name__}: {sentence}"


def add_ratios(rows: Mapping[str, Row], seconds: Mapping[str, Sequence[float]]) -> None:
    """Notes: how much longer the baseline takes, by medians and round by round."""
    for name in seconds.keys() - {BASELINE} if BASELINE in seconds else ():
        ratios = paired_ratios(seconds[BASELINE], seconds[name])
        medians = statistics.median(seconds[BASELINE]) / statistics.median(seconds[name])
        rows[name].add_note(
            f"{BASELINE} / {name} {medians:.2f} by medians, {statistics.median(ratios):.2f} by "
            f"rounds ({min(ratios):.2f} .. {max(ratios):.2f} over {len(ratios)})"
        )


def measure_memory(settings: Settings, rows: Mapping[str, Row]) -> None:
    """Most memory of one rollout above what the engine keeps: see `memory`."""
    for name, row in rows.items():
        arguments: dict[str, object] = {"name": name, "settings": asdict(settings)}
        try:
            row.peak_extra_mem_mib = memory.cpu_peak_extra_mib(
                "benchmarks.rollout.providers:memory_step", arguments
            )
        except memory.NotMeasured as reason:
            row.add_note(f"memory not measured: {reason}")


def run(settings: Settings, args: argparse.Namespace) -> list[Row]:
    """A row per engine, and one for the start of vLLM."""
    shape = settings.shape
    told = (
        f"{shape.name} {args.model} P={shape.num_prompts} K={shape.num_generations} "
        f"prompt={shape.prompt} new={shape.limit}"
    )
    rows = {name: Row("rollout", name, told, "cpu", "float32") for name in args.engines}
    engines = Engines(settings)
    try:
        passed = gate(engines, rows)
        print(f"{told}: gate passed by {', '.join(passed) or 'none'}", flush=True)
        steps = {name: provider.generate for name, provider in passed.items()}
        seconds = harness.time_interleaved(steps, torch.device("cpu"), runs=args.runs, warmup=0)
    finally:
        engines.close()
    for name, times in seconds.items():
        rows[name].set_times(times)
        rows[name].tokens = shape.num_rows * shape.limit
    add_ratios(rows, seconds)
    if not args.no_memory:
        measure_memory(settings, {name: rows[name] for name in passed})
    found = list(rows.values())
    if engines.start_s is not None:
        start = Row("start", "vllm", told, "cpu", "float32")
        start.set_times([engines.start_s])
        found.append(start)
    return found


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--engines", default="hf,vllm,trl-hf", help=f"of {', '.join(MAKERS)}")
    add("--shape", choices=list(SHAPES), default="tldr")
    add("--model", choices=step_models.MODELS, default="pythia-14m", help="random weights")
    add("--num-generations", type=int, help="K; default: the shape's")
    add("--prompts", type=int, help="P per rollout; default: the shape's")
    add("--threads", type=int, default=torch.get_num_threads(), help="the same for all engines")
    add("--runs", type=int, default=5, help="timed rounds")
    add("--no-memory", action="store_true", help="do not measure memory (a process per engine)")
    add("--json", help="write env and rows here")
    args = parser.parse_args(argv)
    args.engines = args.engines.split(",")
    if unknown := [name for name in args.engines if name not in MAKERS]:
        parser.error(f"--engines are {', '.join(MAKERS)}; got {', '.join(unknown)}.")
    if args.runs < 1 or args.threads < 1:
        parser.error(f"--runs and --threads must be >= 1; got {args.runs}, {args.threads}.")
    return args


def make_settings(args: argparse.Namespace, folder: Path) -> Settings:
    shape = SHAPES[args.shape].with_sizes(args.num_generations, args.prompts)
    return Settings(
        model_folder=str(folder / "model"),
        output_folder=str(folder / "out"),
        shape_name=args.shape,
        num_generations=shape.num_generations,
        num_prompts=shape.num_prompts,
        device="cpu",
        dtype="float32",
        rows_per_micro_batch=shape.num_rows,
        beta=0.0,  # no reference model
        gradient_checkpointing=False,
    )


def main(argv: list[str] | None = None) -> int:
    """0 if every engine that could run passed the gate."""
    from transformers.utils import logging

    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)  # vLLM in this process uses the same pool
    env = harness.environment()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps(env))
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(args, Path(folder))
        step_models.save_model(args.model, settings.model_folder)
        rows = run(settings, args)
    print(harness.format_table(rows, baseline=BASELINE), flush=True)
    if args.json:
        harness.write_json(args.json, env, rows)
    return int(any((row.skipped or "").startswith(("wrong", "failed")) for row in rows))
