"""What `make gpu-check` is made of: the numerics table, and steps that share nine minutes."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu_check, loss, numerics
from benchmarks.gpu_check import Step


def test_every_result_is_within_its_bound(tmp_path, capsys):
    assert (
        numerics.main(["--vocab", "503", "--size", "32", "--json", str(tmp_path / "n.json")]) == 0
    )
    rows = json.loads((tmp_path / "n.json").read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    assert f"{len(rows)} results, 0 outside their bound" in capsys.readouterr().out


@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_a_wrong_op_is_seen(monkeypatch, value):
    right = numerics.linear_logprob

    def wrong(*args, **kwargs):
        logps, entropy = right(*args, **kwargs)
        return logps * value, entropy

    monkeypatch.setattr(numerics, "linear_logprob", wrong)
    assert numerics.main(["--vocab", "101", "--size", "16", "--dtype", "float32"]) == 1


def test_the_reference_shares_no_kernel_with_ours():
    from rloo_kernels import segments

    before = segments.use_triton
    with numerics.vendor_free():
        assert not segments.use_triton(torch.empty(1))
    assert segments.use_triton is before


def step(tmp_path, code: str, most_s: float = 60) -> Step:
    (tmp_path / "a_step.py").write_text(code)
    return Step("a_step", "a_step", [], most_s)


@pytest.mark.parametrize(
    ("code", "most_s", "left_s", "outcome"),
    [
        ("print('seen')", 60, 60, "passed"),
        ("raise SystemExit(3)", 60, 60, "exit code 3"),
        ("import time; time.sleep(60)", 11, 60, "stopped after 11 s; what it had written is kept"),
        ("print('seen')", 60, 5, "no time left"),
    ],
    ids=["passes", "fails", "too slow", "no time"],
)
def test_outcome_of_a_step(tmp_path, monkeypatch, code, most_s, left_s, outcome):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    todo = step(tmp_path, code, most_s)
    gpu_check.run(todo, tmp_path, left_s)
    assert todo.outcome == outcome
    assert (tmp_path / "a_step.txt").exists() == (outcome != "no time left")


def test_a_failed_step_does_not_stop_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bad, good = step(tmp_path, "raise SystemExit(1)"), Step("good", "this", [], 60)
    monkeypatch.setattr(gpu_check, "steps", lambda *args: [bad, good])
    assert gpu_check.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [summary[name]["outcome"] for name in ("a_step", "good")] == ["exit code 1", "passed"]


def test_the_steps_are_those_the_benchmarks_take(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {s.name: s for s in gpu_check.steps(tmp_path, "cuda", small=False)}
    assert [*found] == ["numerics", "logits", "linear", "tiles"]
    assert sum(s.most_s for s in found.values()) > 520  # so the common deadline is what ends them
    for name in ("logits", "linear"):
        args = loss.parse_arguments(found[name].arguments)
        assert args.device == "cuda"
        assert {s.num_rows for s in args.shapes} == {16384}
    assert {s.name for s in args.shapes} == {*loss.SHAPES}
