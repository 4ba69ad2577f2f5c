"""The quickstart's path, end to end, with a few words and steps (`make quickstart` is the run)."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from rloo_fast.cli import quickstart, quickstart_tools
from rloo_fast.cli.warm_start import EOS
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


@pytest.fixture(scope="module")
def tools_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("tools")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "draw_curves", draw_curves)
        patch.setattr(quickstart_tools, "NUM_HELDOUT", 12)
        patch.setattr(quickstart_tools, "NUM_RLOO", 40)
        patch.setattr(quickstart_tools, "NUM_DEMONSTRATED", 200)
        patch.setattr(quickstart_tools, "WARM_START_STEPS", 4)
        given = ["--variant", "tools", "--output_dir", str(out), "--max_steps", "2"]
        assert quickstart.main(given) == 0
    return out


def test_the_variant_with_a_tool_measures_answers_and_calls(tools_run):
    result = json.loads((tools_run / "result.json").read_text())
    assert (result["task"], result["method"], result["num_heldout"]) == ("product", "tools", 12)
    for name in ("accuracy_before", "accuracy_after"):
        assert 0 <= result[name] <= 1
    assert min(result["calls_before"], result["calls_after"]) >= 0


def test_demonstrations_are_right_with_a_call_and_wrong_without():
    rows = [{"prompt": [{"role": "user", "content": "37*84"}], "answer": "3108"}]
    tokenizer = quickstart_tools.build_tokenizer()
    made = quickstart_tools.make_demonstrations(Dataset.from_list(rows), tokenizer, 0)
    assert len({len(row["input_ids"]) for row in made}) == 1
    learned = [tokenizer.decode([i for i in row["labels"] if i >= 0]) for row in made]
    called, made_up = sorted(learned, key=len, reverse=True)
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "37*84"}}</tool_call>'
    assert called == call + EOS + "3108" + EOS
    assert made_up.endswith(EOS)
    assert len(made_up.removesuffix(EOS)) == 4
    assert made_up != "3108" + EOS
    texts = [tokenizer.decode(row["input_ids"]) for row in made]
    assert any("<|tool|>3108" in text for text in texts)  # read, and not learned


def test_products_are_in_one_set_only():
    heldout, train, demonstrated = quickstart_tools.make_problems(3)
    texts = [{row[0]["content"] for row in d["prompt"]} for d in (heldout, train, demonstrated)]
    sizes = (quickstart_tools.NUM_HELDOUT, quickstart_tools.NUM_RLOO)
    assert tuple(map(len, texts[:2])) == sizes
    assert not texts[0] & texts[1]
    assert not (texts[0] | texts[1]) & texts[2]
