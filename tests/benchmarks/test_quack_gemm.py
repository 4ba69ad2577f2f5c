"""QuACK's product with our epilogue: its mathematics, QuACK's interface, and that it compiles."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.tuning import quack_gemm
from benchmarks.tuning.quack_gemm import LOG2E, exponentials_reference, refusal, tile_of
from tests.support.paths import python_path
from tests.support.peer_source import module_path

COMPILE = """
import os, sys
import torch
import quack.gemm_runtime.host as host
from quack.cache.async_compile import _pin_dsl_arch
from benchmarks.tuning.quack_gemm import quack_exponentials

_pin_dsl_arch(os.environ["CUTE_DSL_ARCH"])
compile_it = host._compile_gemm_epi

def compile_only(*args, **kwargs):
    print("compiled", compile_it(*args, **kwargs) is not None)
    sys.exit()

host._compile_gemm_epi = compile_only
x, w = torch.zeros(256, 512).bfloat16(), torch.zeros({vocab}, 512).bfloat16()
quack_exponentials(x, w, torch.zeros(256, dtype=torch.long), torch.zeros(256), 1.0)
"""


def inputs(n=12, depth=32, vocab=512):
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, depth), 3 / depth**0.5 * torch.randn(vocab, depth)
    return hidden.bfloat16(), weight.bfloat16(), torch.randint(vocab, (n,))


def test_what_the_product_makes_holds_log_prob_and_gradient():
    hidden, weight, ids = inputs()
    z = hidden.double() @ weight.double().T
    z_y = z.gather(1, ids[:, None]).squeeze(1)
    made = exponentials_reference(hidden, weight, ids, LOG2E * z_y, LOG2E)
    total = made.sums.sum(1)
    torch.testing.assert_close(-total.log(), z.log_softmax(1).gather(1, ids[:, None]).squeeze(1))
    torch.testing.assert_close(made.stored / total[:, None], z.softmax(1))
    torch.testing.assert_close(made.label, z_y)


def test_the_gate_takes_rounding_and_refuses_a_wrong_column():
    hidden, weight, ids = inputs()
    anchor = torch.zeros(len(ids))
    exact = exponentials_reference(hidden, weight, ids, anchor, LOG2E)
    rounded = exact._replace(stored=exact.stored.bfloat16())
    assert refusal(rounded, exact) is None
    wrong = exact._replace(sums=exact.sums.roll(1, 1))
    assert str(refusal(wrong, exact)).startswith("wrong: error of sums")
    assert str(refusal(exact._replace(label=exact.label * torch.nan), exact)).startswith("wrong")


def test_a_vocabulary_that_no_tile_divides_is_refused():
    assert [tile_of(v) for v in (152064, 151936, 50304)] == [256, 128, 192]
    with pytest.raises(ValueError, match="multiple of one of"):
        tile_of(50257)


def parameters(module: str, *path: str) -> set[str]:
    """Names of the parameters of module.Class.method."""
    nodes = ast.parse(module_path(module).read_text()).body
    for name in path:
        (found,) = [
            x for x in nodes if isinstance(x, ast.ClassDef | ast.FunctionDef) and x.name == name
        ]
        nodes = found.body
    assert isinstance(found, ast.FunctionDef)
    return {x.arg for x in [*found.args.args, *found.args.kwonlyargs]}


def test_quack_has_the_interface_that_is_used():
    frontend, ops = "quack.epilogue.frontend", "quack.epilogue.ops"
    decorator = parameters(frontend, "gemm_epilogue")
    assert {"ops", "reduces", "outs", "extra_ops"} <= decorator
    launch = {"A", "B", "D", "epi_args", "tile_M", "tile_N", "cluster_M", "cluster_N", "pingpong"}
    assert launch <= parameters(frontend, "EpiMod", "gemm")
    assert "idx_op" in parameters(ops, "ColVecSelect", "__init__")
    assert parameters("quack.epilogue.math", "pexp2")
    source = module_path(ops).read_text()
    assert "class ColVecReduce(" in source
    assert "class ColVecLoad(" in source


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [2048, 1152])
@pytest.mark.parametrize(("arch", "number"), [("sm_90a", "90"), ("sm_100a", "100")])
def test_the_product_compiles_without_a_gpu(tmp_path, arch, number, vocab):
    """RLOO_QUACK: a folder made by `pip install --target` with quack-kernels and what it needs."""
    folder = os.environ.get("RLOO_QUACK", "")
    if not folder and find_spec("cutlass") is None:
        pytest.skip("nvidia-cutlass-dsl is not installed, and RLOO_QUACK names no folder with it")
    packages = Path(folder) / "nvidia_cutlass_dsl" / "dsl_packages"
    worker = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE).replace("{vocab}", str(vocab))],
        env={
            **os.environ,
            "PYTHONPATH": python_path(f"{folder}{os.pathsep}{packages}" if folder else ""),
            "CUDA_VISIBLE_DEVICES": "",
            "CUTE_DSL_ARCH": arch,
            "QUACK_ARCH": number,
            "QUACK_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert worker.stdout.split() == ["compiled", "True"], worker.stderr[-2000:]


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert quack_gemm.main([]) == 1
    assert "needs a GPU" in capsys.readouterr().err
