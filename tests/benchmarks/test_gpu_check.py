"""What `make gpu-check` is made of: the numerics table, and steps that share nine minutes."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import rloo_fast
from benchmarks import gpu_check
from benchmarks.attention import run as attention
from benchmarks.gpu_check import Step
from benchmarks.loss import run as loss
from benchmarks.step import providers as step_providers
from benchmarks.step import run as step_benchmark
from benchmarks.tuning import numerics

STEPS = [
    "numerics", "attention", "attention_window", "attention_softcap", "logits", "linear",
    "predicted", "products", "tiles", "update",
]  # fmt: skip
ON_GPU_ALONE = ("predicted", "products", "tiles")


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
    from rloo_kernels.loss import rloo_objective as module

    before = module.use_triton
    with numerics.vendor_free():
        assert not module.use_triton(torch.empty(1))
    assert module.use_triton is before


def step(tmp_path, code: str, share_s: float = 60) -> Step:
    (tmp_path / "a_step.py").write_text(code)
    return Step("a_step", "a_step", [], share_s)


@pytest.mark.parametrize(
    ("code", "limit", "outcome"),
    [
        ("print('seen')", 60, "passed"),
        ("raise SystemExit(3)", 60, "exit code 3"),
        ("import time; time.sleep(60)", 2, "stopped after 2 s; what it had written is kept"),
        ("print('seen')", 0.5, "no time left"),
    ],
    ids=["passes", "fails", "too slow", "no time"],
)
def test_outcome_of_a_step(tmp_path, monkeypatch, code, limit, outcome):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "LEAST_S", 1)
    todo = step(tmp_path, code)
    gpu_check.run(todo, tmp_path, limit)
    assert todo.outcome == outcome
    assert (tmp_path / "a_step.txt").exists() == (outcome != "no time left")


def test_a_failed_step_does_not_stop_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bad, good = step(tmp_path, "raise SystemExit(1)"), Step("good", "this", [], 60)
    monkeypatch.setattr(gpu_check, "steps", lambda *args: [bad, good])
    assert gpu_check.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [summary[name]["outcome"] for name in ("a_step", "good")] == ["exit code 1", "passed"]


def test_what_lacks_a_package_is_skipped_with_its_reason(tmp_path, monkeypatch, capsys):
    todo = [Step("good", "this", [], 60), Step("lacking", "this", [], 60, ("torch", "no_such"))]
    (tmp_path / "lacking.txt").write_text("from an earlier run")
    monkeypatch.setattr(gpu_check, "steps", lambda *args: todo)
    assert gpu_check.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["good"]["outcome"] == "passed"
    assert summary["lacking"] == {"seconds": None, "outcome": "skipped: no_such not installed"}
    assert "from an earlier run" not in capsys.readouterr().out


def test_a_step_may_take_its_share_and_what_is_left_of_those_before(tmp_path, monkeypatch):
    clock, limits = [0.0], {}

    def fake(step, out, limit):
        limits[step.name] = limit
        clock[0] += {"short": 10.0, "whole": limit, "last": 0.0}[step.name]
        step.outcome, step.seconds = "passed", 1.0

    names = ("short", "whole", "absent", "last")
    todo = [Step(n, "this", [], 50, ("no_such",) if n == "absent" else ()) for n in names]
    for name in names:
        (tmp_path / f"{name}.txt").write_text("")
    monkeypatch.setattr(gpu_check, "steps", lambda *args: todo)
    monkeypatch.setattr(gpu_check, "run", fake)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: clock[0])
    gpu_check.main(["--out", str(tmp_path), "--device", "cpu", "--seconds", "300"])
    assert limits == {"short": 100, "whole": 190, "last": 100}


def test_the_steps_are_those_the_benchmarks_take(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {s.name: s for s in gpu_check.steps(tmp_path, "cuda", small=False)}
    assert [*found] == STEPS
    assert sum(s.share_s for s in found.values()) == 520
    told = re.findall(r"^ +(\d+) s ", str(gpu_check.__doc__), re.MULTILINE)
    assert told == [str(s.share_s) for s in found.values()]
    for name in ("logits", "linear"):
        args = loss.parse_arguments(found[name].arguments)
        assert args.device == "cuda"
        assert {s.num_rows for s in args.shapes} == {16384}
    assert {s.name for s in args.shapes} == {*loss.SHAPES}
    options = []
    for name in (n for n in STEPS if n.startswith("attention")):
        args = attention.parse_arguments(found[name].arguments)
        assert (args.device, args.shape) == ("cuda", ["tldr", "math"])
        assert {*args.dtypes} == {"float32", "bfloat16"}
        assert args.providers == [*attention.PROVIDERS]
        options.append((args.window, args.softcap))
    assert options == [(None, None), (256, None), (None, 2.0)]
    args = step_benchmark.parse_arguments(found["update"].arguments)
    assert (args.device, args.model, args.shape) == ("cuda", "pythia-410m", "tldr")
    assert args.providers == ["ours_padded", "ours", "trl"]


@pytest.mark.parametrize("name", [n for n in STEPS if n.startswith(("attention", "update"))])
def test_a_small_step_runs_on_a_cpu(tmp_path, name):
    found = {s.name: s for s in gpu_check.steps(tmp_path, "cpu", small=True)}
    assert [*found] == [n for n in STEPS if n not in ON_GPU_ALONE]
    module = importlib.import_module(f"{found[name].module}.run")
    assert module.main(found[name].arguments) == 0
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    ours = [row for row in rows if row["provider"] in ("ours", "shared_prefix")]
    assert ours
    assert all(row["seconds_median"] for row in ours)


def imported(path: Path) -> tuple[set[str], set[Path]]:
    """(other packages, files of this one) that a file imports when it is imported."""
    packages, files = set(), set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            found = [folder, *(folder / alias.name for alias in node.names)]
            files |= {x for f in found for x in (f.with_suffix(".py"), f / "__init__.py")}
    return packages, {f for f in files if f.exists()}


def test_the_update_needs_what_the_trainer_imports():
    every_step = {"benchmarks", "rloo_fast", "rloo_kernels", "torch", "transformers"}
    of_transformers = {"huggingface_hub", "numpy", "safetensors", "tokenizers", "tqdm"}
    of_torch = {"jinja2"}
    todo = {Path(rloo_fast.__file__).parent / "trainer.py", Path(step_providers.__file__)}
    seen, packages = set(), set()
    while todo:
        path = todo.pop()
        seen.add(path)
        found, files = imported(path)
        packages |= found
        todo |= files - seen
    packages -= every_step | of_transformers | of_torch | sys.stdlib_module_names
    assert packages == {*gpu_check.TRAINER_NEEDS}
    assert all(importlib.util.find_spec(name) for name in packages)
