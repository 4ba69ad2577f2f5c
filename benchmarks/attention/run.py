"""Attention of one layer over the same completions: prompts shared, packed, padded, concatenated.

    python -m benchmarks.attention --shape tldr --dtype float32,bfloat16 --json FILE

Forward and backward from given q, k, v and gradient of the output. What a micro-batch makes once
for all layers (segments, masks, indices) is not timed. Shapes are those of `step_models`; as in
training, the last token of a completion is not run.

    shared_prefix   ours, every prompt once, by the backend that `choose_backend` picks
    packed          ours, a prompt per completion, no padding
    shared_varlen, shared_flex, shared_sdpa: shared_prefix by a backend that is not picked
    padded          torch's causal SDPA, a line per completion
    concatenated    torch's SDPA, every prompt once: completions see a copy of its keys, then theirs

SDPA takes a window as a mask and has no soft-cap: with one, `padded` is a chain of torch operations
and `concatenated` is not run.

Gate: output at the completions' tokens and gradients of q, k, v (a prompt's summed over its copies)
against float64, made in pieces; allowed is twice the error of `padded` + `batches.ATOL`.

FLOPs needed, H heads of size d: 4 d H forward (q.k, p v) and 10 d H backward (q.k again, dO.v, dq,
dk, dv) per visible (query, key) pair, every prompt once. Floor: these / the rate of a dense GEMM.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch

from benchmarks.attention.providers import PROVIDERS, Call, Case, reference, unavailable
from benchmarks.common import harness, memory
from benchmarks.common.harness import Row
from benchmarks.common.models import SHAPES
from benchmarks.loss import batches
from benchmarks.loss.run import DTYPES
from rloo_fast.policy.attention.flash import choose_backend

PEERS = ("padded", "concatenated")  # the others are ours
PEAK_GEMM = (8192, 8192, 8192)


def run_case(
    case: Case, names: list[str], *, runs: int, warmup: int = 1, measure_memory: bool = True
) -> list[Row]:
    """One row per provider of `names`: gate, then interleaved times, then memory."""
    exact = reference(case)
    allowed = exact.errors(Call("padded", case).results())
    told, tokens = str(case), sum(len(own) for _, own in case.rows)
    calls: dict[str, Call] = {}
    rows = {name: Row("attention", name, told, case.device, case.dtype) for name in names}
    for name, row in rows.items():
        row.skipped = unavailable(name, case)
        if row.skipped is not None:
            continue
        try:
            call = Call(name, case)
            errors = exact.errors(call.results())
        except Exception as error:  # it gets a reason, not a figure
            sentence = (str(error).strip().splitlines() or ["no message"])[0][:200]
            row.skipped = f"failed: {type(error).__name__}: {sentence}"
            continue
        row.skipped = batches.refusal(errors, allowed, DTYPES[case.dtype])
        if row.skipped is None:
            calls[name] = call
            row.error_vs_reference = max(errors.values())
    del exact
    device = torch.device(case.device)
    for name, seconds in harness.time_interleaved(calls, device, runs=runs, warmup=warmup).items():
        rows[name].set_times(seconds)
        rows[name].tokens = tokens
        rows[name].add_note(_note(name, calls[name]))
    if measure_memory:
        set_memory(calls, rows)
    return list(rows.values())


def _note(name: str, call: Call) -> str:
    """Places that the provider fills, padding included, and the backend where it is picked."""
    told, case = f"{len(call.grad)} tokens", call.case
    if name in ("shared_prefix", "packed"):
        device, dtype = torch.device(case.device), DTYPES[case.dtype]
        told += f", {choose_backend(device, dtype, case.head_dim, softcap=case.softcap)[0]}"
    return told


def set_memory(calls: dict[str, Call], rows: dict[str, Row]) -> None:
    """Most memory of one call above its inputs: results, and what is saved for backward."""
    for name, call in calls.items():
        if call.case.device == "cuda":
            rows[name].peak_extra_mem_mib = harness.cuda_peak_extra_mib(call)
            continue
        arguments: dict[str, object] = {"name": name, "case": asdict(call.case)}
        try:
            rows[name].peak_extra_mem_mib = memory.cpu_peak_extra_mib(
                "benchmarks.attention.providers:memory_step", arguments
            )
        except memory.NotMeasured as reason:
            rows[name].add_note(f"memory not measured: {reason}")


def add_floors(rows: list[Row], case: Case) -> str:
    """Fill `floor_seconds` from a GEMM rate measured now; returns the line that says so."""
    rate = harness.cuda_gemm_flops_per_s(*PEAK_GEMM, DTYPES[case.dtype])
    for row in rows:
        if row.seconds_median is not None:
            row.floor_seconds = case.flops() / rate
    return f"{case.flops() / 1e9:.4g} GFLOP needed, dense GEMM {rate / 1e12:.0f} TFLOP/s"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--shape", action="append", choices=list(SHAPES), help="repeatable; default: tldr")
    add("--groups", type=int, help="prompts; default: the shape's, more on a GPU")
    add("--num-generations", type=int, help="K; default: the shape's")
    add("--heads", type=int, default=8)
    add("--kv-heads", type=int, default=8)
    add("--head-dim", type=int, default=64)
    add("--window", type=int, help="a query sees its own key and window - 1 before it")
    add("--softcap", type=float, help="scores become c tanh(score / c)")
    add("--providers", default=",".join(PROVIDERS), help=f"of {', '.join(PROVIDERS)}")
    add("--dtype", default="float32,bfloat16", help=f"comma-separated, of {', '.join(DTYPES)}")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--runs", type=int, default=5, help="timed rounds")
    add("--warmup", type=int, default=1, help="rounds before the timed ones")
    add("--no-memory", action="store_true", help="do not measure memory (a process per provider)")
    add("--json", help="write env and rows here")
    args = parser.parse_args(argv)
    args.providers, args.dtypes = args.providers.split(","), args.dtype.split(",")
    if unknown := [name for name in args.providers if name not in PROVIDERS]:
        parser.error(f"--providers are {', '.join(PROVIDERS)}; got {', '.join(unknown)}.")
    if unknown := [name for name in args.dtypes if name not in DTYPES]:
        parser.error(f"--dtype takes {', '.join(DTYPES)}; got {', '.join(unknown)}.")
    for name in ("groups", "num_generations", "heads", "kv_heads", "head_dim", "window", "softcap",
                 "runs"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be > 0, got {value}.")
    if args.heads % args.kv_heads:
        parser.error(f"--kv-heads must divide --heads, got {args.kv_heads} and {args.heads}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU.")
    return args


def cases(args: argparse.Namespace, dtype: str) -> list[Case]:
    """One case per shape."""
    found = []
    for name in args.shape or ["tldr"]:
        shape = SHAPES[name].on(args.device).with_sizes(args.num_generations, args.groups)
        sizes = (shape.num_prompts, shape.num_generations, args.heads, args.kv_heads, args.head_dim)
        found.append(Case(name, *sizes, dtype, args.device, args.window, args.softcap))
    return found


def main(argv: list[str] | None = None) -> int:
    """0 if every provider of ours that could run passed the gate."""
    args, env = parse_arguments(argv), harness.environment()
    print(json.dumps(env))
    all_rows: list[Row] = []
    for dtype in args.dtypes:
        torch._dynamo.reset()  # else flex's graphs of one type count against the next one's limit
        for case in cases(args, dtype):
            rows = run_case(
                case,
                args.providers,
                runs=args.runs,
                warmup=args.warmup,
                measure_memory=not args.no_memory,
            )
            if args.device == "cuda":
                print(add_floors(rows, case))
            print(harness.format_table(rows, baseline="padded"), flush=True)
            all_rows += rows
            if args.json:  # after each: a later one may run out of memory or of time
                harness.write_json(args.json, env, all_rows)
    bad = ("wrong", "failed")
    return int(any((r.skipped or "").startswith(bad) for r in all_rows if r.provider not in PEERS))
