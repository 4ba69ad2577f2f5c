"""Kernels are launched on the device of their tensors, whichever is current.

Triton launches on the current device and its current stream. So every launcher makes the device of
its tensors the current one; the stream is then that of torch on it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tests.support.pretend_cuda import CUDA, PretendCuda

jit = pytest.importorskip("triton.runtime.jit", reason="Triton has wheels for Linux alone")

from triton.backends.compiler import GPUTarget  # noqa: E402


class CurrentDevice:
    """Stands in for torch.cuda.device, as a context; `now` is None outside of one."""

    def __init__(self):
        self.now: torch.device | None = None
        self.at_launch: list[tuple[str, torch.device | None]] = []

    def context(self, device):
        outer = self

        class Context:
            def __enter__(self):
                self.before, outer.now = outer.now, torch.device(device)

            def __exit__(self, *_):
                outer.now = self.before

        return Context()

    def run(self, kernel, *args, **kwargs):
        self.at_launch.append((kernel.fn.__name__, self.now))


@pytest.fixture
def current():
    current = CurrentDevice()

    def run(kernel, *args, **kwargs):
        current.run(kernel, *args, **kwargs)

    active = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: {"multiprocessor_count": 132}),
    )
    with (
        mock.patch("triton.runtime.driver", SimpleNamespace(active=active)),
        mock.patch.object(jit.JITFunction, "run", run),
        mock.patch.object(torch.cuda, "device", current.context),
    ):
        yield current


def on_cuda(*tensors):
    return [x.to(CUDA) for x in tensors]


def launch_rows():
    from rloo_kernels.logprob.rows_triton import backward_triton_, forward_triton

    logits, ids, grad = on_cuda(torch.randn(4, 33), torch.arange(4), torch.ones(4))
    statistics = forward_triton(logits, ids, None, 1.0, True)
    backward_triton_(logits, logits, ids, None, statistics, grad, grad, 1.0)


def launch_objective():
    from rloo_kernels.loss.objective_triton import objective_triton
    from rloo_kernels.loss.types import LossInputs, LossOptions

    logps, bounds, rewards = on_cuda(torch.randn(8), torch.arange(0, 9, 2), torch.randn(4))
    options = LossOptions(num_generations=2, denominator=4)
    objective_triton(
        logps, bounds, LossInputs(rewards, None, None, None, None, None), None, options
    )


def launch_piece(dtype):
    from rloo_kernels.lm_head.piece_triton import forward_piece_triton
    from rloo_kernels.lm_head.types import LMHead

    hidden, weight = on_cuda(torch.randn(4, 32, dtype=dtype), torch.randn(65, 32, dtype=dtype))
    (ids,) = on_cuda(torch.arange(4))
    forward_piece_triton(hidden, LMHead(weight, None, 1.0, None, 1.0), ids, False, True, None)


def launch_weight():
    from rloo_kernels.lm_head.weight_triton import add_in_memory, adds_in_memory

    total, matrix, scaled = on_cuda(
        torch.zeros(64, 32), torch.randn(4, 64).bfloat16(), torch.randn(4, 32).bfloat16()
    )
    assert adds_in_memory(total, matrix, scaled)
    add_in_memory(total, matrix, scaled)


@pytest.mark.parametrize(
    ("launch", "kernels"),
    [
        (launch_rows, {"_forward_kernel", "_backward_kernel"}),
        (launch_objective, {"_segments_kernel"}),
        (lambda: launch_piece(torch.float32), {"_forward_kernel", "_backward_kernel"}),
        (lambda: launch_piece(torch.bfloat16), {"persistent_kernel", "combine_kernel"}),
        (launch_weight, {"_weight_kernel"}),
    ],
    ids=["rows", "objective", "library piece", "matrix piece", "weight gradient"],
)
def test_kernels_are_launched_on_the_device_of_their_tensors(current, launch, kernels):
    with PretendCuda():
        launch()
    assert kernels <= {name for name, _ in current.at_launch}
    assert {device for _, device in current.at_launch} == {CUDA}
    assert current.now is None


def test_triton_launches_on_the_current_device_and_stream():
    """The interface that the launchers rely on, in the installed Triton's source."""
    source = ast.parse(textwrap.dedent(inspect.getsource(jit.JITFunction.run)))
    assigned = {
        ast.unparse(node.targets[0]): ast.unparse(node.value)
        for node in ast.walk(source)
        if isinstance(node, ast.Assign)
    }
    assert assigned["device"] == "driver.active.get_current_device()"
    assert assigned["stream"] == "driver.active.get_current_stream(device)"


def test_its_driver_asks_torch_for_them():
    from triton.backends.driver import GPUDriver

    source = inspect.getsource(GPUDriver)
    assert "torch.cuda.current_device" in source
    assert "get_current_stream" in source
