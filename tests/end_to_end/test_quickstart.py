"""The quickstart's path, end to end, with a few words and steps (`make quickstart` is the run)."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from rloo_fast.cli import quickstart
from rloo_fast.reports.card_code import literal
from rloo_fast.reports.recorder import Recorder
from tests.support.no_curves import draw_curves


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "draw_curves", draw_curves)
        patch.setattr(quickstart, "NUM_HELDOUT", 12)
        patch.setattr(quickstart, "NUM_RLOO", 70)
        patch.setattr(quickstart, "NUM_DEMONSTRATED", 200)
        patch.setattr(quickstart, "WARM_START_STEPS", 4)
        assert quickstart.main(["--output_dir", str(out), "--max_steps", "2", "--seed", "3"]) == 0
    return out


def test_the_result_holds_what_was_measured(run):
    result = json.loads((run / "result.json").read_text())
    for name in ("accuracy_before", "accuracy_after", "greedy_before", "greedy_after"):
        assert 0 <= result[name] <= 1
    assert (result["num_heldout"], result["seed"], result["steps"]) == (12, 3, 2)
    assert result["train_s"] > 0
    assert result["completion_tokens_per_s"] > 0
    assert "torch" in result["versions"]


def test_the_result_says_where_and_beside_what_it_was_measured(run):
    machine = json.loads((run / "result.json").read_text())["machine"]
    assert machine["cpu"]
    assert machine["cpu_cores"] >= 1
    assert min(machine["load_average_before"], machine["load_average_after"]) >= 0


def test_the_card_asks_for_a_word_backward(run):
    heldout = json.loads((run / "heldout.jsonl").read_text().splitlines()[0])["prompt"]
    assert literal(heldout) in (run / "rloo/README.md").read_text()
    assert "capital of France" not in (run / "rloo/README.md").read_text()


def test_the_trained_model_loads_and_differs_from_the_warm_start(run):
    trained = AutoModelForCausalLM.from_pretrained(run / "rloo")
    start = AutoModelForCausalLM.from_pretrained(run / "warm_start")
    assert trained.num_parameters() == start.num_parameters() > 1_000_000
    assert not trained.lm_head.weight.equal(start.lm_head.weight)


def test_heldout_words_are_not_trained_on(run):
    words = [
        {json.loads(line)["prompt"] for line in (run / f"{name}.jsonl").read_text().splitlines()}
        for name in ("heldout", "train")
    ]
    assert len(words[0]) == 12
    assert len(words[1]) == 70
    assert not words[0] & words[1]


def test_the_curves_are_drawn(run):
    assert (run / "rloo" / "curves.png").read_bytes().startswith(b"\x89PNG")
