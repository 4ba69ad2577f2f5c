"""The RLOO loss beside its peers: time, extra memory and error of one forward and backward.

    python -m benchmarks.loss --shape pythia-410m --rows 2048 --json FILE --plot FILE.png

Every provider first passes the gate (`benchmarks.loss.batches.refusal`: loss and gradients against
float64, no more than twice eager's error) on poisoned memory, then all are timed interleaved.

FLOPs of the job `linear`, N rows: logits 2NDV, dX 2NDV, dW 2NDV = 6NDV; recomputing the logits adds
2NDV. Bytes of the job `logits`, b bytes per logit: forward reads NVb; forward + backward reads 2NVb
and writes NVb.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import harness, memory
from benchmarks.common.harness import Row
from benchmarks.loss import batches, providers
from benchmarks.loss.batches import Batch, Reference
from benchmarks.loss.providers import Provider

SHAPES = {  # (D, V)
    "pythia-410m": (1024, 50304),
    "pythia-1b": (2048, 50304),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-7b": (3584, 152064),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_ROWS = {"cpu": 2048, "cuda": 16384}
MALLOC_PERTURB = -6  # glibc: mallopt's option to fill what malloc hands out


@dataclass(frozen=True)
class Shape:
    """N rows (tokens), D hidden, V vocabulary."""

    name: str
    num_rows: int
    hidden: int
    vocab: int

    @classmethod
    def parse(cls, text: str, num_rows: int) -> Shape:
        """A name of SHAPES, with `num_rows`, or "N,D,V"."""
        if text in SHAPES:
            return cls(text, num_rows, *SHAPES[text])
        try:
            rows, hidden, vocab = (int(part) for part in text.split(","))
        except ValueError:
            raise ValueError(
                f"shape must be one of {', '.join(SHAPES)}, or N,D,V; got {text!r}."
            ) from None
        batches.check_rows(rows)
        return cls("custom", rows, hidden, vocab)

    def __str__(self) -> str:
        return f"{self.name} N={self.num_rows} D={self.hidden} V={self.vocab}"


@dataclass(frozen=True)
class Job:
    """What is benchmarked: who does it, and the names of what they give."""

    name: str
    providers: Mapping[str, Provider]
    reference: Callable[..., Reference]  # of a Batch, and of an objective where one has another
    gradients: tuple[str, ...]  # of the leaves; empty: forward only

    def batch(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Batch:
        if self.name == "linear":
            sizes = (shape.num_rows, shape.hidden, shape.vocab)
            return batches.linear_batch(*sizes, dtype, device)
        return batches.logits_batch(shape.num_rows, shape.vocab, dtype, device)

    def call(self, provider: Provider, batch: Batch) -> dict[str, Tensor]:
        """One call, its results by name: what is timed."""
        if not self.gradients:
            with torch.no_grad():
                out = provider.run(batch)
            return dict(zip(("logps", "entropy"), out, strict=True))
        out = provider.run(batch)
        loss, *entropy = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(loss, batch.leaves)
        outputs = {"loss": loss.detach(), **dict(zip(self.gradients, grads, strict=True))}
        return outputs | dict(zip(("entropy",), entropy, strict=False))

    def step(self, provider: Provider, batch: Batch) -> Callable[[], dict[str, Tensor]]:
        if provider.prepare is not None:
            batch = provider.prepare(batch)
        return lambda: self.call(provider, batch)


JOBS = {
    "linear": Job(
        "linear", providers.LINEAR, batches.linear_reference, ("grad_hidden", "grad_weight")
    ),
    "logits_forward": Job("logits_forward", providers.LOGITS_FORWARD, batches.logits_reference, ()),
    "logits_loss": Job(
        "logits_loss", providers.LOGITS_LOSS, batches.logits_reference, ("grad_logits",)
    ),
}


def poison(device: torch.device, on: bool, num_bytes: int = 0) -> None:
    """Uninitialised memory holds nan (CUDA) or 3.4e38 (glibc), so an output that is not written, or
    is added to without being cleared, shows."""
    if device.type == "cuda" and on:
        big = torch.full((num_bytes // 4,), float("nan"), device=device)
        small = [torch.full((1 << 17,), float("nan"), device=device) for _ in range(64)]
        del big, small  # the caching allocator hands these bytes out again
    elif device.type == "cpu":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(MALLOC_PERTURB, 0x80 if on else 0)  # new memory is filled with ~0x80 = 0x7f


def gate_step(
    job: Job, provider: Provider, step: Callable[[], dict[str, Tensor]], reference: Reference
) -> dict[str, float]:
    """Errors of one call on poisoned memory."""
    device = next(iter(reference.outputs.values())).device
    poison(device, True, sum(4 * x.numel() for x in reference.outputs.values()))
    try:
        outputs = step()
    finally:
        poison(device, False)
    if provider.crop is not None:
        outputs = {k: provider.crop(v) if k in job.gradients else v for k, v in outputs.items()}
    if not provider.loss_is_rloo:
        outputs.pop("loss")
    return reference.errors(outputs)


def _gate_by_its_own(
    job: Job, provider: Provider, step: Callable[[], dict[str, Tensor]], batch: Batch
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of one call, and those of eager, by another objective than RLOO's."""
    reference = job.reference(batch, provider.objective)
    eager = Provider(lambda given: providers.eager(given, provider.objective))
    return gate_step(job, provider, step, reference), gate_step(
        job, eager, job.step(eager, batch), reference
    )


def run_job(
    job: Job,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    names: list[str],
    *,
    runs: int,
    warmup: int = 1,
    measure_memory: bool = True,
) -> list[Row]:
    """One row per provider of `names`: gate, then interleaved times, then memory."""
    torch._dynamo.reset()  # each shape compiles for itself
    batch = job.batch(shape, dtype, device)
    reference = job.reference(batch)
    dtype_name = str(dtype).removeprefix("torch.")
    steps, rows = {}, {}
    eager = job.providers["eager"]
    eager_errors = gate_step(job, eager, job.step(eager, batch), reference)
    for name in names:
        row = rows[name] = Row(job.name, name, str(shape), device.type, dtype_name)
        provider = job.providers[name]
        row.skipped = provider.available(device)
        if row.skipped is None:
            try:
                step = job.step(provider, batch)
                allowed = eager_errors
                if provider.objective is batches.rloo_loss_torch:
                    errors = gate_step(job, provider, step, reference)
                else:
                    errors, allowed = _gate_by_its_own(job, provider, step, batch)
            except Exception as error:  # a peer may raise anything; it gets a reason, not a figure
                sentence = (str(error).strip().splitlines() or ["no message"])[0][:200]
                row.skipped = f"failed: {type(error).__name__}: {sentence}"
                continue
            row.skipped = batches.refusal(errors, allowed, dtype)
            if row.skipped is None:
                steps[name], row.note = step, provider.note or None
                row.error_vs_reference = max(errors.values())
    del reference
    for name, seconds in harness.time_interleaved(steps, device, runs=runs, warmup=warmup).items():
        rows[name].set_times(seconds)
        rows[name].tokens = shape.num_rows
    if measure_memory:
        _set_memory(job, batch, device, {name: rows[name] for name in steps}, steps)
    return list(rows.values())


def _set_memory(job, batch: Batch, device, rows: dict[str, Row], steps) -> None:
    if device.type == "cuda":
        for name, row in rows.items():
            row.peak_extra_mem_mib = harness.cuda_peak_extra_mib(steps[name])
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "batch.pt")
        batch.save(path)
        for name, row in rows.items():
            arguments: dict[str, object] = {"job": job.name, "provider": name, "path": path}
            try:
                row.peak_extra_mem_mib = memory.cpu_peak_extra_mib(
                    "benchmarks.loss.run:memory_step", arguments
                )
            except memory.NotMeasured as error:
                row.add_note(f"memory not measured: {error}")


def memory_step(job: str, provider: str, path: str) -> Callable[[], dict[str, Tensor]]:
    """The step of one provider on the batch saved at `path`, for the memory process."""
    return JOBS[job].step(JOBS[job].providers[provider], Batch.load(path))


def add_floors(rows: list[Row], shape: Shape, dtype: torch.dtype) -> str:
    """Fill `floor_seconds` of CUDA rows from rates measured now; returns the line that says so."""
    logits_bytes = shape.num_rows * shape.vocab * dtype.itemsize
    flops = 6 * shape.num_rows * shape.hidden * shape.vocab
    rate = harness.cuda_gemm_flops_per_s(shape.num_rows, shape.hidden, shape.vocab, dtype)
    copy = harness.cuda_copy_bytes_per_s()
    floors = {
        "linear": flops / rate,
        "logits_forward": logits_bytes / copy,
        "logits_loss": 3 * logits_bytes / copy,
    }
    for row in rows:
        if row.skipped is None and row.seconds_median:
            row.floor_seconds = floors[row.benchmark]
            if row.benchmark != "linear":
                moved = floors[row.benchmark] * copy
                row.add_note(f"{moved / row.seconds_median / 1e9:.0f} GB/s")
    return (
        f"dense GEMM {rate / 1e12:.0f} TFLOP/s, device copy {copy / 1e9:.0f} GB/s: "
        f"6NDV {1e3 * floors['linear']:.2f} ms, logits read {1e3 * floors['logits_forward']:.2f} ms"
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    known = list(dict.fromkeys(name for job in JOBS.values() for name in job.providers))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--shape", action="append", help=f"{', '.join(SHAPES)}, or N,D,V; repeatable")
    add("--rows", type=int, help="N of the named shapes (2048 on a CPU, 16384 on a GPU)")
    add("--providers", default=",".join(known), help=f"of {', '.join(known)}")
    add("--job", choices=["linear", "logits"], default="linear")
    add("--dtype", default="float32", help=f"comma-separated, of {', '.join(DTYPES)}")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--runs", type=int, default=5, help="timed rounds")
    add("--warmup", type=int, default=1, help="rounds before the timed ones")
    add("--no-memory", action="store_true", help="do not measure memory (a process per provider)")
    add("--json", help="write env and rows here")
    add("--plot", help="write a PNG here")
    args = parser.parse_args(argv)
    rows = args.rows or DEFAULT_ROWS[args.device]
    try:
        batches.check_rows(rows)
        args.shapes = [Shape.parse(text, rows) for text in args.shape or ["pythia-410m"]]
    except ValueError as error:
        parser.error(str(error))
    args.providers = args.providers.split(",")
    args.dtypes = args.dtype.split(",")
    if unknown := [name for name in args.providers if name not in known]:
        parser.error(f"--providers are {', '.join(known)}; got {', '.join(unknown)}.")
    if unknown := [name for name in args.dtypes if name not in DTYPES]:
        parser.error(f"--dtype takes {', '.join(DTYPES)}; got {', '.join(unknown)}.")
    if args.runs < 1 or args.warmup < 0:
        parser.error(f"--runs must be >= 1 and --warmup >= 0; got {args.runs}, {args.warmup}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU.")
    return args


def main(argv: list[str] | None = None) -> int:
    """0 if every provider of ours that could run passed the gate."""
    args = parse_arguments(argv)
    device, env = torch.device(args.device), harness.environment()
    print(json.dumps(env))
    all_rows: list[Row] = []
    for shape in args.shapes:
        for dtype in (DTYPES[name] for name in args.dtypes):
            rows = []
            for job in (job for name, job in JOBS.items() if name.startswith(args.job)):
                names = [name for name in args.providers if name in job.providers]
                rows += run_job(
                    job,
                    shape,
                    dtype,
                    device,
                    names,
                    runs=args.runs,
                    warmup=args.warmup,
                    measure_memory=not args.no_memory,
                )
            if args.device == "cuda":
                print(add_floors(rows, shape, dtype))
            print(harness.format_table(rows), flush=True)
            all_rows += rows
            if args.json:  # after each shape: a later one may run out of memory
                harness.write_json(args.json, env, all_rows)
    if args.plot:
        from benchmarks.common.plots import plot_rows

        plot_rows(env, all_rows, args.plot)
    bad = ("wrong", "failed")
    return int(any((r.skipped or "").startswith(bad) for r in all_rows if r.provider[:4] == "ours"))
