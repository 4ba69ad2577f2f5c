"""A result is the input of the next evaluation, and a line of a table."""

from __future__ import annotations

import json

import pytest

from rloo_fast import cli
from rloo_fast.judges.results import read_result, read_samples
from tests.support.judge_runs import result, rows_file, run, texts_file


def test_samples_of_a_result_are_texts_of_the_next_and_results_share_a_table(capsys):
    rows = rows_file()
    texts_file("a.jsonl", [row["completion"] for row in rows[:9]] + ["w9"] * 3, rows)
    texts_file("b.jsonl", ["w9"] * 12, rows)
    run("--completions", "a.jsonl", "--judge", "rouge")
    argv = ("--completions", "out/samples.jsonl", "--against", "b.jsonl", "--judge", "rouge")
    run(*argv, "--output_dir", "second")
    found, _ = result("second")
    assert (found["figures"]["win_rate"], found["figures"]["num_ties"]) == (1.0, 3)
    capsys.readouterr()
    assert cli.main(["eval", "judge", "--table", "out", "second"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


DAMAGED = (
    "", "null", "[]", "3", '"text"', "{}", "[" * 100_000, '{"settings": 3}', "\xff",
    '{"settings": {"completions": 3, "model_name_or_path": 3, "against": 3}, "figures": []}',
)  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:12])
def test_a_file_that_is_not_ours_is_named(tmp_path, text):
    (tmp_path / "result.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"result.json was not written by `rloo-fast eval judge`"):
        read_result(str(tmp_path))
    assert read_samples(tmp_path / "result.json", "x") is None


def test_a_result_of_other_types_is_named(tmp_path):
    cells = {"win_rate_low": 1, "win_rate_high": 1, "rouge": [1], "win_rate": 1, "num_decided": 1}
    figures = {**cells, "num_ties": 1, "num_no_verdict": 1, "first_won": 1}
    settings = dict.fromkeys(("completions", "against", "judge", "judge_model"), "a")
    text = json.dumps({"settings": {**settings, "both_orders": False}, "figures": figures})
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match="was not written by"):
        read_result(str(tmp_path))
