"""Seconds to bring the policy's weights into the vLLM engine of the same process.

    python -m benchmarks.sync --model pythia-70m --bucket-mib 1,16,256 --json FILE
    python -m benchmarks.sync --table --model smollm2-135m --runs 5    see table.py

Two policies: `full`, and `lora`, whose layers are sent as W + scale B A. Providers:

    ours N MiB       VLLMEngine.load_weights of buckets of N MiB: one model.load_weights call, the
                     engine's weights poisoned with NaN before it and searched for NaN after it
    unchecked        the same stream, largest bucket, without these two
    each             one model.load_weights call per parameter, as TRL 1.16 does it
    reload           vLLM's own collective_rpc("reload_weights") of all of them at a time
    copy             the floor: torch's copy_ of as many bytes, sums of LoRA layers done before

reload_weights with one parameter per call is not among them: with vLLM 0.32 the second such sync
gives NaN or log-probs of other weights, and no later load mends the engine.

Gate: with weights that are new in every parameter, the log-probs of what the engine samples after
the sync are within 1e-4 of a full forward of the policy. It is the warm-up too. The providers take
turns. On a CPU, in fp32. Extra memory is that of one sync, measured in this process after freed
pages were given back.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import harness, memory
from benchmarks.common import models as step_models
from benchmarks.common.harness import Row
from benchmarks.rollout.providers import (
    BUCKET_BYTES,
    Unavailable,
    largest_error,
    start_vllm,
)
from benchmarks.rollout.run import TOLERANCE, failure
from rloo_fast.weight_sync.buckets import weight_buckets

from .policies import POLICIES, PROMPTS, SAMPLING, SHAPE, change, make_policy, wake_weights
from .table import table

Sync = Callable[[], object]
BASELINE = "each"


# Providers


def make_syncs(engine: Any, policy: Any, bucket_mib: list[int]) -> dict[str, Sync]:
    """The ways of the module's docstring, each a call that syncs once."""
    largest = max(bucket_mib) * 2**20

    def stream() -> Iterator[tuple[str, Tensor]]:
        return (named for bucket in weight_buckets(policy, largest) for named in bucket)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        with torch.no_grad():
            engine.llm.apply_model(lambda model: model.load_weights(weights))

    def load_each() -> None:
        for named in stream():
            load([named])

    def reload() -> None:
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream()})

    def then_forget(sync: Sync) -> Sync:  # the keys and values of the former weights
        return lambda: (sync(), engine.llm.reset_prefix_cache())

    ours: dict[str, Sync] = {
        f"ours {mib} MiB": lambda mib=mib: engine.load_weights(
            engine.version, weight_buckets(policy, mib * 2**20)
        )
        for mib in bucket_mib
    }
    return ours | {
        "unchecked": then_forget(lambda: load(stream())),
        "each": then_forget(load_each),
        "reload": then_forget(reload),
    }


def make_copy(policy: Any) -> tuple[Sync, int]:
    """The floor, and its bytes."""
    sources = [tensor.clone() for bucket in weight_buckets(policy, 1) for _, tensor in bucket]
    targets = [torch.zeros_like(tensor) for tensor in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return copy, sum(tensor.nbytes for tensor in sources)


# Gate and figures


def gate(engine: Any, policy: Any, syncs: dict[str, Sync], rows: dict[str, Row]) -> dict[str, Sync]:
    """One sync of new weights by each provider; returns those that the engine then follows."""
    passed: dict[str, Sync] = {}
    for name, sync in syncs.items():
        change(policy)
        try:
            error = error_after(engine, policy, sync)
        except Exception as reason:  # it gets a reason, not a figure
            rows[name].skipped = failure(reason)
            continue
        if not error <= TOLERANCE:  # nan: refused
            rows[name].skipped = f"wrong: log-probs off by {error:.1e} after the sync"
            continue
        rows[name].error_vs_reference = error
        passed[name] = sync
    return passed


def error_after(engine: Any, policy: Any, sync: Sync) -> float:
    """max |log-prob by the engine - by the policy| of what it samples after `sync`."""
    wake_weights(engine)
    try:
        sync()
    except Exception:
        engine.load_weights(0, weight_buckets(policy, BUCKET_BYTES))  # for the next one
        raise
    engine.wake(("kv_cache",))
    rollout = engine.generate(PROMPTS, SAMPLING, range(len(PROMPTS)), version=0)
    return largest_error(policy, PROMPTS, rollout)


def run_policy(engine: Any, policy: Any, told: str, args: argparse.Namespace) -> list[Row]:
    """A row per provider."""
    syncs = make_syncs(engine, policy, args.bucket_mib)
    copy, num_bytes = make_copy(policy)
    gib = num_bytes / 2**30
    rows = {
        name: Row("sync", name, f"{told} {gib:.3f} GiB", "cpu", "float32")
        for name in (*syncs, "copy")
    }
    passed = gate(engine, policy, syncs, rows) | {"copy": copy}
    wake_weights(engine)
    seconds = harness.time_interleaved(passed, torch.device("cpu"), runs=args.runs, warmup=0)
    for name, times in seconds.items():
        rows[name].set_times(times)
        rows[name].add_note(f"{statistics.median(times) / gib:.3g} s/GiB")
        rows[name].floor_seconds = statistics.median(seconds["copy"])
        rows[name].peak_extra_mem_mib = memory.measure(passed[name])
    engine.wake(("kv_cache",))
    return list(rows.values())


def run(args: argparse.Namespace) -> list[Row]:
    """The rows of both policies, served by one engine."""
    model = make_policy(args.model, "full")
    try:
        engine = start_vllm(model, SHAPE)
    except Unavailable as reason:
        return [Row("sync", "all", args.model, "cpu", "float32", skipped=str(reason))]
    rows: list[Row] = []
    try:
        for policy in args.policies:
            trained = model if policy == "full" else make_policy(args.model, policy)
            rows += run_policy(engine, trained, f"{args.model} {policy}", args)
    finally:
        engine.close()
    return rows


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sync", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", choices=step_models.MODELS, default="pythia-14m", help="random weights")
    add("--policies", default=",".join(POLICIES), help=f"of {', '.join(POLICIES)}")
    add("--bucket-mib", default="1,16,256", help="sizes of ours, comma-separated")
    add("--threads", type=int, default=torch.get_num_threads(), help="the same for all providers")
    add("--runs", type=int, default=7, help="timed rounds")
    add("--table", action="store_true", help="full, LoRA merged, LoRA as adapter; also by a server")
    add("--places", default="colocate,server", help="where the engines of --table run")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of --table's engines")
    add("--json", help="write env and rows here")
    args = parser.parse_args(argv)
    args.policies = args.policies.split(",")
    args.places = args.places.split(",")
    args.bucket_mib = [int(size) for size in args.bucket_mib.split(",")]
    if unknown := [name for name in args.policies if name not in POLICIES]:
        parser.error(f"--policies are {', '.join(POLICIES)}; got {', '.join(unknown)}.")
    if unknown := {*args.places} - {"colocate", "server"}:
        parser.error(f"--places are colocate and server; got {', '.join(sorted(unknown))}.")
    if args.table and args.model not in step_models.GROUPED:
        known = ", ".join(step_models.GROUPED)
        parser.error(f"--table needs a model in which vLLM has LoRA: {known}; got {args.model}.")
    if min(args.runs, args.threads, *args.bucket_mib) < 1:
        parser.error("--runs, --threads and --bucket-mib must be >= 1.")
    return args


def main(argv: list[str] | None = None) -> int:
    """0 if every provider of ours passed the gate."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    env = harness.environment()
    print(json.dumps(env))
    rows = table(args) if args.table else run(args)
    print(harness.format_table(rows, baseline=BASELINE), flush=True)
    if args.json:
        harness.write_json(args.json, env, rows)
    ours = [row for row in rows if args.table or row.provider.startswith("ours")]
    return int(any((row.skipped or "").startswith(("wrong", "failed")) for row in ours))
