"""The cases of `benchmarks.loss` under pytest-benchmark.

    python -m pytest benchmarks --benchmark-json=FILE

LOSS_SHAPES, LOSS_ROWS, LOSS_DTYPES and LOSS_DEVICE (separated by spaces) choose other cases than
the small default. pytest-benchmark times one provider after the other: `python -m benchmarks.loss`
interleaves them and is what the project's tables come from.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

from benchmarks.loss import batches
from benchmarks.loss.run import DEFAULT_ROWS, DTYPES, JOBS, Shape, gate_step

DEVICE = torch.device(os.environ.get("LOSS_DEVICE", "cpu"))
NUM_ROWS = int(os.environ.get("LOSS_ROWS", DEFAULT_ROWS[DEVICE.type]))
SHAPES = os.environ.get("LOSS_SHAPES", "256,64,2048").split()
DTYPE_NAMES = os.environ.get("LOSS_DTYPES", "float32").split()


@functools.lru_cache(maxsize=1)  # one shape's tensors at a time
def prepared(job_name: str, shape_text: str, dtype_name: str):
    """(batch, reference, eager's errors) of a case."""
    job, dtype = JOBS[job_name], DTYPES[dtype_name]
    batch = job.batch(Shape.parse(shape_text, NUM_ROWS), dtype, DEVICE)
    reference = job.reference(batch)
    eager = job.providers["eager"]
    return batch, reference, gate_step(job, eager, job.step(eager, batch), reference)


CASES = [
    (job_name, shape, dtype, provider)
    for job_name, job in JOBS.items()
    for shape in SHAPES
    for dtype in DTYPE_NAMES
    for provider in job.providers
]


@pytest.mark.parametrize(("job_name", "shape", "dtype", "name"), CASES)
def test_loss(benchmark, job_name: str, shape: str, dtype: str, name: str):
    job = JOBS[job_name]
    provider = job.providers[name]
    if reason := provider.available(DEVICE):
        pytest.skip(reason)
    batch, reference, eager_errors = prepared(job_name, shape, dtype)
    step = job.step(provider, batch)
    errors = gate_step(job, provider, step, reference)
    assert batches.refusal(errors, eager_errors, DTYPES[dtype]) is None
    benchmark.group = f"{job_name} {shape} {dtype} {DEVICE.type}"
    benchmark.extra_info |= {"note": provider.note, "error_vs_reference": max(errors.values())}

    def timed():
        out = step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return out

    benchmark(timed)
