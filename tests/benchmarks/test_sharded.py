"""The benchmark of sharded updates: run once at a tiny size, its gate, its refusals."""

from __future__ import annotations

import pytest

from benchmarks.common import harness
from benchmarks.common import models as step_models
from benchmarks.common.harness import Row
from benchmarks.sharded import run as sharded
from benchmarks.sharded.worker import Injected

FIGURES = {"seconds": 1.0, "threads": 1, "loss": 1e-8, "grad_norm": 2.0, "reward_std": 0.5}


class Told:
    """A group whose first update gave these figures."""

    def __init__(self, **figures):
        self.figures = FIGURES | figures

    def ask(self, word):
        if "failure" in self.figures:
            raise sharded.Failed(self.figures["failure"])
        return [self.figures]


def judged(**figures) -> Row:
    row = Row("sharded", "ours ddp", "", "cpu", "float32")
    sharded.gate(row, Told(**figures), FIGURES)  # pyright: ignore
    return row


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_under_fsdp2_are_measured(tmp_path):
    path = tmp_path / "sharded.json"
    tiny = ["--model", "tiny", "--shape", "short", "--engines", "fsdp2", "--trainers", "ours"]
    assert sharded.main([*tiny, "--runs", "1", "--json", str(path)]) == 0
    _, (row,) = harness.read_json(path)
    assert row.provider == "ours fsdp2"
    assert row.skipped is None
    assert row.tokens == sum(step_models.SHAPES["short"].lengths())
    assert row.seconds_median > 0
    assert row.peak_extra_mem_mib > 1


def test_other_figures_than_the_baseline_s_are_not_timed():
    assert judged(loss=1e-6).skipped is None  # of rewards whose spread is 0.5
    assert judged(grad_norm=2.01).skipped.startswith("wrong: relative differences above 0.001")
    assert judged(loss=1e-3).skipped.startswith("wrong")
    assert judged(grad_norm=float("nan")).skipped.startswith("wrong")


def test_a_provider_that_fails_says_why():
    assert judged(failure="ValueError: no").skipped == "failed: ValueError: no"
    text = "  File 'x'\n[rank1]: ValueError: the first\n[rank0]: RuntimeError: Connection closed\n"
    assert sharded._last_error(text) == "ValueError: the first"


def test_each_process_gets_the_completions_of_its_own_prompts():
    shape = step_models.SHAPES["short"]
    injected = Injected(shape, 512)
    half = shape.num_rows // 2
    for rows in (slice(0, half), slice(half, None)):
        found = injected.for_trl(injected.prompt_ids[rows], None, None)
        assert found == injected.completion_ids[rows]


@pytest.mark.parametrize("wrong", [["--engines", "ddp,fsdp"], ["--prompts", "3"], ["--runs", "0"]])
def test_a_wrong_argument_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        sharded.parse_arguments(wrong)
    assert wrong[-1].split(",")[-1] in capsys.readouterr().err
