"""One RLOO update, and one whole step, ours beside TRL's: time, tokens run, memory.

    python -m benchmarks.step --shape tldr --model pythia-70m --split --json FILE

`update`: completions are given; reference, [old log-probs], forward, backward, optimizer step are
timed. `step`: the same with generation, transformers' `generate` in both, as many tokens in both.
Trainers, shapes and models: `step_providers`, `step_models`.

Gate: on the first update, from common weights (not the reference's, so that the KL counts), loss,
gradient norm and gradients must agree with the baseline's: trl, or else the first provider. It is
the warm-up too. Then the trainers take turns, a b | b a | a b ..., so that a pair of neighbours
sees the same machine; ratios are taken pair by pair. `tokens` are the completion tokens trained on,
the same for all; what was run for them is in the note.

--split runs the whole ladder of `step_providers`; each rung's factor is (median of the rung above)
/ (its median), and the factors multiply to the total.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common import harness, memory
from benchmarks.common import models as step_models
from benchmarks.common.harness import Row
from benchmarks.common.models import MODELS, SHAPES
from benchmarks.step.profile import format_shares, profile_update
from benchmarks.step.providers import LADDER, Settings, Steps, Unavailable, differences

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # relative; see step_providers.differences
PEAK_GEMM = (8192, 8192, 8192)


@dataclass(frozen=True)
class Factor:
    """What one rung of the ladder gains over the one above it."""

    above: str
    rung: str
    factor: float  # ratio of medians
    lowest: float  # of the paired ratios
    highest: float
    saves: str


def make_steps(names: Sequence[str], settings: Settings, rows: dict[str, Row]) -> dict[str, Steps]:
    """The trainers that can be made; the rows of the others say why not."""
    made: dict[str, Steps] = {}
    for name in names:
        reference = next((s.reference for s in made.values()), None)
        try:
            made[name] = Steps(name, settings, reference)
        except Unavailable as reason:
            rows[name].skipped = str(reason)
        except Exception as error:  # it gets a reason, not a figure
            rows[name].skipped = _failure(error)
    return made


def _failure(error: Exception) -> str:
    if isinstance(error, ValueError) and str(error).startswith("layout="):  # only a trial tells
        return f"its config is refused: {error}"
    sentence = (str(error).strip().splitlines() or ["no message"])[0][:200]
    return f"failed: {type(error).__name__}: {sentence}"


def gate(steps: dict[str, Steps], rows: dict[str, Row], tolerance: float) -> dict[str, Steps]:
    """One update each, compared; returns those that agree with the baseline."""
    passed: dict[str, Steps] = {}
    baseline = None
    for name in sorted(steps, key=lambda name: name != "trl"):  # trl first; a stable sort
        row = rows[name]
        try:
            found = steps[name].first_update()
        except Exception as error:
            row.skipped = _failure(error)
            continue
        baseline = baseline or found
        errors = differences(found, baseline)
        row.error_vs_reference = max(errors.values())
        if not all(error <= tolerance for error in errors.values()):  # nan: refused
            told = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
            row.skipped = f"wrong: relative differences above {tolerance:g}: {told}"
            row.error_vs_reference = None
            continue
        passed[name] = steps[name]
    return {name: passed[name] for name in steps if name in passed}


def take_turns(
    steps: Mapping[str, Callable[[], float]], pairs: int, what: str
) -> dict[str, list[float]]:
    """Seconds of `pairs` calls of every step, in turn: a b | b a | a b ...; prints them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for pair in range(pairs):
        for name in steps if pair % 2 == 0 else reversed(list(steps)):
            seconds[name].append(steps[name]())
        told = ", ".join(f"{name} {times[-1]:.4g}" for name, times in seconds.items())
        print(f"{what} {pair + 1}, seconds: {told}", flush=True)
    return seconds


def paired_ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def split(seconds: Mapping[str, Sequence[float]]) -> list[Factor]:
    """The factors between neighbours of the ladder that were timed, from the top."""
    names = [name for name in LADDER if name in seconds]
    factors = []
    for above, rung in itertools.pairwise(names):
        ratios = paired_ratios(seconds[above], seconds[rung])
        factor = statistics.median(seconds[above]) / statistics.median(seconds[rung])
        rungs = list(LADDER)  # those in between that were skipped are in this factor
        reached = rungs[rungs.index(above) + 1 : rungs.index(rung) + 1]
        saves = "; ".join(LADDER[name].saves for name in reached)
        factors.append(Factor(above, rung, factor, min(ratios), max(ratios), saves))
    return factors


def add_ratios(rows: Mapping[str, Row], seconds: Mapping[str, Sequence[float]]) -> None:
    """The note of our row: how much longer trl takes, or ours of before, pair by pair."""
    for name in ("trl", "trl_gpu_head", "ours_groups"):
        if name in seconds and "ours" in seconds:
            ratios = paired_ratios(seconds[name], seconds["ours"])
            rows["ours"].add_note(
                f"{name} / ours {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} .. {max(ratios):.2f} over {len(ratios)} pairs)"
            )
    if "trl" in rows and rows["trl"].device == "cpu":
        rows["trl"].add_note("on a CPU its head scores prompts too: see trl_gpu_head")


def format_split(seconds: Mapping[str, Sequence[float]]) -> str:
    factors = split(seconds)
    lines = ["split of the speed-up (each rung over the one above it; spread of the pairs)"]
    for f in factors:
        spread = f"{f.lowest:.2f} .. {f.highest:.2f}"
        lines.append(f"  {f.rung:<24}{f.factor:>6.2f} x  {spread:<16}{f.saves}")
    top, bottom = factors[0].above, factors[-1].rung
    medians = statistics.median(seconds[top]) / statistics.median(seconds[bottom])
    product = math.prod(f.factor for f in factors)
    lines.append(f"  product {product:.2f} x; {top} / {bottom} by medians {medians:.2f} x")
    return "\n".join(lines)


def measure_memory(settings: Settings, steps: dict[str, Steps], rows: dict[str, Row]) -> None:
    """Most memory of one update above weights, reference, optimizer state: see `memory`."""
    for name in steps:
        if settings.device == "cuda":
            rows[name].peak_extra_mem_mib = harness.cuda_peak_extra_mib(steps[name].update)
            continue
        arguments: dict[str, object] = {"name": name, "settings": asdict(settings)}
        try:
            rows[name].peak_extra_mem_mib = memory.cpu_peak_extra_mib(
                "benchmarks.step.providers:memory_step", arguments
            )
        except memory.NotMeasured as reason:
            rows[name].add_note(f"memory not measured: {reason}")


def add_floors(settings: Settings, rows: dict[str, Row]) -> str:
    """Floor and MFU of CUDA rows: `step_models.update_flops` / the GEMM rate measured now."""
    dtype = getattr(torch, settings.dtype)
    rate = harness.cuda_gemm_flops_per_s(*PEAK_GEMM, dtype)
    flops = step_models.update_flops(settings.model_folder, settings.shape, settings.beta)
    for row in rows.values():
        if row.seconds_median is not None:
            row.floor_seconds = flops / rate
            row.add_note(f"MFU {flops / rate / row.seconds_median:.1%}")
    return f"{flops / 1e12:.3g} TFLOP needed, dense GEMM {rate / 1e12:.0f} TFLOP/s"


def run(settings: Settings, args: argparse.Namespace) -> tuple[list[Row], dict[str, int]]:
    """All rows of the run and the threads each trainer saw; prints what has no place in a row."""
    shape = settings.shape
    told = (
        f"{shape.name} {args.model} P={shape.num_prompts} K={shape.num_generations} "
        f"prompt={shape.prompt} limit={shape.limit}"
    )
    names = args.providers
    new = {n: Row("update", n, told, settings.device, settings.dtype) for n in names}
    steps = gate(make_steps(names, settings, new), new, TOLERANCE[settings.dtype])
    tokens = sum(shape.lengths())
    print(f"{told}: gate passed by {', '.join(steps) or 'none'}", flush=True)
    seconds = take_turns({name: s.update for name, s in steps.items()}, args.runs, "update")
    for name, times in seconds.items():
        new[name].set_times(times)
        new[name].tokens = tokens
        passes = steps[name].policy_passes, steps[name].reference_passes
        new[name].add_note(f"policy {passes[0]}, reference {passes[1]}")
    rows = list(new.values())
    if args.whole_step_runs:
        rows += whole_rows(settings, steps, told, args.whole_step_runs)
    if not args.no_memory:
        measure_memory(settings, steps, new)
    if settings.device == "cuda":
        print(add_floors(settings, new))
    for name in (n for n in args.profile if n in steps):
        print(format_shares(name, profile_update(steps[name].update, settings.device)))
    add_ratios(new, seconds)
    if args.split and len(seconds) > 1:
        print(format_split(seconds))
    return rows, {name: s.watch.threads for name, s in steps.items()}


def whole_rows(settings: Settings, steps: dict[str, Steps], told: str, runs: int) -> list[Row]:
    """Rows of `step`: ours and trl with real generation, of shape.limit tokens for every row."""
    whole = {name: s.whole for name, s in steps.items() if name in ("ours", "trl")}
    for step in whole.values():
        step()
    seconds = take_turns(whole, runs, "step")
    rows = {n: Row("step", n, told, settings.device, settings.dtype) for n in seconds}
    for name, times in seconds.items():
        rows[name].set_times(times)
        rows[name].tokens = settings.shape.num_rows * settings.shape.limit
    add_ratios(rows, seconds)
    return list(rows.values())


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="tldr")
    add("--model", choices=MODELS, default="pythia-14m", help="from its config, random weights")
    add("--providers", default="ours,trl", help=f"of {', '.join(LADDER)}")
    add("--split", action="store_true", help="run the whole ladder, print each rung's factor")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=list(TOLERANCE), default="float32", help="bfloat16: autocast")
    add("--num-generations", type=int, help="K; default: the shape's")
    add("--prompts", type=int, help="P per step; default: the shape's")
    add("--rows-per-micro-batch", type=int, help="default: all P K rows at a time")
    add("--beta", type=float, default=0.05)
    add("--gradient-checkpointing", action="store_true")
    add("--runs", type=int, default=5, help="timed pairs")
    add("--whole-step-runs", type=int, default=2, help="the same with generation; 0: none")
    add("--no-memory", action="store_true", help="do not measure memory (a process per provider)")
    add("--profile", nargs="?", const="ours", default="", help="providers; default: ours")
    add("--json", help="write env and rows here")
    args = parser.parse_args(argv)
    args.providers, args.profile = (
        args.providers.split(","),
        [*filter(None, args.profile.split(","))],
    )
    if unknown := [n for n in (*args.providers, *args.profile) if n not in LADDER]:
        parser.error(f"providers are {', '.join(LADDER)}; got {', '.join(unknown)}.")
    if args.split:
        args.providers = list(LADDER)
    shape = SHAPES[args.shape].on(args.device).with_sizes(args.num_generations, args.prompts)
    args.rows_per_micro_batch = args.rows_per_micro_batch or shape.num_rows
    if shape.num_generations < 2 or shape.num_prompts < 1:
        parser.error(f"--num-generations must be >= 2 and --prompts >= 1; got {shape}.")
    if args.rows_per_micro_batch < 1 or shape.num_rows % args.rows_per_micro_batch:
        parser.error(
            f"--rows-per-micro-batch must divide the step's {shape.num_rows} rows; got "
            f"{args.rows_per_micro_batch}."
        )
    if args.runs < 1 or args.whole_step_runs < 0:
        parser.error(f"--runs must be >= 1; got {args.runs}, {args.whole_step_runs}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU.")
    args.sizes = shape
    return args


def main(argv: list[str] | None = None) -> int:
    """0 if every provider that could run passed the gate."""
    from transformers.utils import logging

    args, env = parse_arguments(argv), harness.environment()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps(env))
    print(f"completion lengths: {args.sizes.distribution()}; {args.sizes.lengths()}")
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            model_folder=str(Path(folder) / "model"),
            output_folder=str(Path(folder) / "out"),
            shape_name=args.shape,
            num_generations=args.sizes.num_generations,
            num_prompts=args.sizes.num_prompts,
            device=args.device,
            dtype=args.dtype,
            rows_per_micro_batch=args.rows_per_micro_batch,
            beta=args.beta,
            gradient_checkpointing=args.gradient_checkpointing,
        )
        step_models.save_model(args.model, settings.model_folder)
        rows, threads = run(settings, args)
    print(f"threads in a step: {threads}")
    print(harness.format_table(rows, baseline="trl"), flush=True)
    if args.json:
        harness.write_json(args.json, env, rows)
    return int(any((row.skipped or "").startswith(("wrong", "failed")) for row in rows))
