"""The benchmark of dynamic sampling runs, and its table has what was measured."""

import json

from benchmarks.dynamic_sampling.run import main


def test_its_table(tmp_path, capsys):
    file = tmp_path / "rows.json"
    options = ["--p", "0.5", "--prompts", "8", "--groups", "80", "--json", str(file)]
    assert main(options) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["batches"] == 10
    assert row["without_signal"] == 0
    assert 1.2 <= row["generated_per_used"] <= 3
    assert f"| {row['times_p']:.4f} |" in capsys.readouterr().out
