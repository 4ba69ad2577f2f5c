"""The cost model: its floors, its pieces and bytes are the real ones, and it takes measurements."""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rloo_kernels.lm_head import piece
from rloo_kernels.lm_head.waves import HeadShape, Pieces

from benchmarks.common import harness
from benchmarks.common.harness import Row
from benchmarks.loss.run import SHAPES as SHAPES_OF_THE_LOSS
from benchmarks.tuning import assumptions, cost_model
from benchmarks.tuning.assumptions import DEVICES, GIB
from benchmarks.tuning.cost_model import CURRENT, DESIGNS, NUM_ROWS, SHAPES, Call
from tests.rloo_kernels.lm_head.test_outputs_on_gpu import bytes_of_outputs
from tests.support.triton_process import run_worker

CASES = [*itertools.product(SHAPES, DEVICES, [40, 10, 2])]


def call(shape: str, device: str = "H100", free_gib: float = 40) -> Call:
    return Call(NUM_ROWS, *SHAPES[shape], DEVICES[device], int(free_gib * GIB))


def test_shapes_and_floors_are_those_of_the_plan():
    """6 N D V at 790 TFLOP/s, in ms, as the table of the design has them."""
    assert SHAPES == SHAPES_OF_THE_LOSS
    floors = [round(call(name, "H200").floor * 1e3, 2) for name in SHAPES]
    assert floors == [6.41, 12.82, 16.94, 67.82]


@pytest.mark.parametrize(("shape", "device", "gib"), CASES)
def test_no_part_of_the_plan_makes_a_call_slower(shape, device, gib):
    ratios = [call(shape, device, gib).ratio(design) for design in DESIGNS]
    assert all(after <= before for before, after in itertools.pairwise(ratios)), ratios
    assert ratios[-1] < ratios[0] - 0.1
    assert ratios[-1] > 0.98  # nothing is faster than its products


@pytest.mark.parametrize(("shape", "device", "gib"), CASES)
def test_pieces_are_those_of_the_planner(shape, device, gib, monkeypatch):
    monkeypatch.setattr(piece, "free_bytes", lambda _: int(gib * GIB))
    monkeypatch.setattr("rloo_kernels.dispatch.triton_missing", lambda: "pretended")
    depth, vocab = SHAPES[shape]
    hidden = mock.Mock(spec=torch.Tensor)
    hidden.is_cuda, hidden.shape, hidden.dtype = True, (NUM_ROWS, depth), torch.bfloat16
    hidden.device, hidden.element_size = torch.device("cuda"), lambda: 2
    weight = torch.empty(vocab, depth, dtype=torch.bfloat16, device="meta")
    most = piece.planned_rows(hidden, weight, None, True)
    cut = Pieces(most, HeadShape(depth, vocab, 132)).cut(0, NUM_ROWS)
    found = call(shape, device, gib).pieces(CURRENT)
    assert found == [x.stop - x.start for x in cut]
    assert sum(found) == NUM_ROWS


@pytest.mark.parametrize("gib", [40, 2])
def test_bytes_of_outputs_are_those_counted(gib):
    """A piece's dX beside its product (4 n D), its c X, and dW's way from its sum to .grad."""
    one = call("qwen2.5-7b", free_gib=gib)
    num_pieces = len(one.pieces(CURRENT))
    assert (num_pieces == 1) == (gib == 40)
    counted = bytes_of_outputs(num_pieces)
    n, depth, vocab = one.num_rows, one.hidden_size, one.vocab_size
    rows = (counted["dX"] - 4 + counted["c X"]) * n * depth
    out = counted["dW, from its sum to .grad"] * vocab * depth + 4 * n * depth
    assert one.parts(CURRENT)["outputs"] == pytest.approx(one.moved(rows + out))


def test_a_faster_memory_and_a_faster_product_both_help():
    slow = call("qwen2.5-0.5b")
    for change in ({"flops_per_s": 900e12}, {"bytes_per_s": 9e12}, {"clock_hz": 2e9}):
        fast = cost_model.replace(slow, device=cost_model.replace(slow.device, **change))
        assert fast.seconds(DESIGNS[0]) < slow.seconds(DESIGNS[0]), change


def test_tables_have_every_shape_and_design(capsys):
    assert cost_model.main(["--device", "H200", "--free-gib", "40", "--parts"]) == 0
    printed = capsys.readouterr().out
    assert all(design.name in printed for design in DESIGNS)
    assert len(re.findall(r"^all ", printed, re.MULTILINE)) == len(SHAPES)
    assert f"{call('qwen2.5-7b', 'H200').ratio(DESIGNS[0]):.3f}" in printed
    assert "6 x 2341 + 2338 -> 16384" in printed


# --- beside what a GPU measured


def measured(tmp_path: Path, gpu: str) -> Path:
    shape = "qwen2.5-7b N=16384 D=3584 V=152064"
    row = Row("linear", "ours", shape, "cuda", "bfloat16")
    row.set_times([0.08, 0.09, 0.10])
    row.floor_seconds = 0.0667
    others = [Row("linear", "eager", shape, "cuda", "bfloat16")]
    path = tmp_path / "linear.json"
    harness.write_json(path, {"gpu": gpu}, [row, *others])
    return path


def test_a_prediction_stands_beside_what_was_measured(tmp_path, capsys):
    path, out = measured(tmp_path, "NVIDIA H200"), tmp_path / "predicted.json"
    assert cost_model.main(["--measured", str(path), "--json", str(out)]) == 0
    (line,) = json.loads(out.read_text())["rows"]
    assert line["measured_s"] == 0.09
    assert line["predicted_s"] == pytest.approx(sum(line["parts_s"].values()))
    # the floor is of products D deep; those of dX and dW are deeper, and faster
    assert 0.9 < line["predicted_s"] / 0.0667 < 1.2
    printed = capsys.readouterr().out
    assert re.search(rf"90\.00 +{line['predicted_s'] * 1e3:.2f} ", printed)


def test_a_gpu_without_assumptions_gets_no_prediction(tmp_path):
    (line,) = cost_model.beside_measured(measured(tmp_path, "NVIDIA A100"))
    assert line["predicted_s"] is None
    assert "A100" in line["why"]


def test_without_a_measurement_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cost_model.main(["--measured", str(tmp_path / "none.json")])
    assert "does not exist" in capsys.readouterr().err


# --- instructions, from the machine code


def instructions() -> dict[str, Any]:
    """Of the head kernel outside its products, at the shape that `assumptions` names."""
    from rloo_kernels.lm_head.matrix_triton import matrix_piece
    from rloo_kernels.lm_head.types import LMHead

    from tests.support import aot

    def launch() -> None:
        depth, vocab, n = 3584, 152064, 2304
        weight = aot.untouched((vocab, depth), torch.bfloat16)
        hidden, ids = aot.untouched((n, depth), torch.bfloat16), aot.untouched((n,), torch.int64)
        matrix_piece(hidden, LMHead(weight, None, 1.0, None, 1.0), ids, False, True)

    rows = aot.compile_for("sm_90", launch)
    row = next(row for row in rows if row.kernel == "persistent_kernel")
    return {
        "instructions": sum(row.epilogue.values()),
        "exponentials": row.epilogue.get("MUFU", 0),
    }


@functools.cache
def compiled() -> dict[str, Any]:
    return run_worker(Path(__file__), "--compile", interpret=False)


@pytest.mark.slow
def test_instructions_are_those_of_the_machine_code():
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    kernel = CURRENT.kernel
    assert compiled()["instructions"] == pytest.approx(kernel.instructions, rel=0.1)
    assert compiled()["exponentials"] == pytest.approx(kernel.exponentials, rel=0.05)
    assert kernel is not assumptions.LIBRARY_EPILOGUE


if __name__ == "__main__":
    assert sys.argv[1:] == ["--compile"]
    print(json.dumps(instructions()))
