"""use_liger_kernel=True: Liger's layers under our head, loss and layouts.

`python -m tests.policy.test_liger_layers` with TRITON_INTERPRET=1 trains in Triton's interpreter,
with Liger's layers and without, and prints the largest relative difference of a parameter's
gradient.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.support.triton_process import run_worker

LAYOUTS = ("padded", "shared_prefix")


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("liger_kernel")
    return run_worker(Path(__file__), interpret=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layers_are_ligers(found, layout):
    assert found[layout]["norm"].startswith("liger_kernel.")
    assert found[layout]["layout"] == layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_those_without(found, layout):
    assert found[layout]["difference"] < 1e-5


def differences() -> dict:
    """Without Liger first: it stays in transformers' classes."""
    from tests.step.test_update import train
    from tests.support.tiny import make_model

    def run(name: str, **fields):
        model = make_model(num_hidden_layers=1)  # which has all of Liger's kernels
        rows = {"per_device_train_batch_size": 4, "num_generations": 2}
        return train(Path(folder) / name, model=model, **rows, **fields)

    with tempfile.TemporaryDirectory() as folder:
        plain = run("plain")
        liger = {layout: run(layout, layout=layout, use_liger_kernel=True) for layout in LAYOUTS}
    return {layout: compare(trainer, plain) for layout, trainer in liger.items()}


def compare(liger, plain) -> dict:
    assert liger.gradient.keys() == plain.gradient.keys()
    return {
        "difference": max(
            ((liger.gradient[name] - g).norm() / g.norm().clamp(min=1e-2)).item()
            for name, g in plain.gradient.items()
        ),
        "norm": liger.model.model.norm.forward.__func__.__module__,
        "layout": liger.update.planner.layout_name,
    }


def mend_interpreter() -> None:
    """Python floats reach a kernel as fp32 scalars, and there is an rsqrt, as on a GPU."""
    import liger_kernel.ops.rms_norm as rms_norm
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    # libdevice's returns nothing in the interpreter; tl.rsqrt is patched in while a kernel runs
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    convert = interpreter._implicit_cvt

    def with_floats(arg):
        if type(arg) is not float:
            return convert(arg)
        handle = interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = with_floats


def main() -> None:
    mend_interpreter()
    print(json.dumps(differences()))


if __name__ == "__main__":
    main()
