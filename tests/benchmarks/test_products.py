"""Ways to dX and dW against each other, on a CPU: each is right, a wrong one is not timed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.tuning import products

SMALL = ["--device", "cpu", "--dtype", "float32", "--shape", "256,12,192", "--runs", "1"]


def test_every_way_is_timed(tmp_path, capsys):
    assert products.main([*SMALL, "--json", str(tmp_path / "p.json")]) == 0
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    names = [(row["benchmark"], row["provider"]) for row in rows]
    assert names == [
        *(("dX", f"{s} part{'s' * (s > 1)}") for s in (1, 2, 3, 4, 6, 8)),
        ("dW", "library"),
    ]
    assert all(row["seconds_median"] > 0 for row in rows)
    assert max(row["error_vs_reference"] for row in rows) < 1e-6
    assert "the code's way" in next(row["note"] for row in rows if row["provider"] == "1 part")


@pytest.mark.parametrize("error", [1.05, float("nan")])
def test_a_wrong_way_is_not_timed(monkeypatch, tmp_path, error):
    right = products.product
    monkeypatch.setattr(
        products,
        "product",
        lambda a, b, dtype, parts: right(a, b, dtype, parts) * error ** (parts > 1),
    )
    assert products.main([*SMALL, "--json", str(tmp_path / "p.json")]) == 1
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    wrong = [row for row in rows if row["provider"].endswith("parts")]
    assert all(row["skipped"].startswith("wrong") for row in wrong)
    assert all(row["seconds_median"] is None for row in wrong)


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        products.main([])
    assert "sees no GPU" in capsys.readouterr().err
