"""Texts by a model, by adapters, or from a file."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig, get_peft_model

from rloo_fast.judges.texts import generate
from tests.support.judge_runs import result, run, saved, tiny_llama


def test_greedy_texts_do_not_depend_on_the_batch():
    prompts = ["w1 w2", "w3", "w4 w5 w6 w7 w8 w9"]
    together = generate(saved("model", tiny_llama()), prompts, max_new_tokens=8)
    alone = [generate("model", [p], max_new_tokens=8, seed=1)[0] for p in prompts]
    assert together == alone
    assert all(together)
    assert "<" not in "".join(together)  # no pad or EOS


def test_texts_of_adapters_are_those_of_base_and_adapters(tmp_path):
    saved("base", tiny_llama())
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(tiny_llama(), lora)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    saved("adapter", adapted, with_tokenizer=False)
    saved("sum", adapted.merge_and_unload())
    base, adapter, total = (
        generate(name, ["w1 w2 w3"], max_new_tokens=12) for name in ("base", "adapter", "sum")
    )
    assert adapter == total != base


@pytest.mark.parametrize("length", ["125", "5000"], ids=["for one prompt", "for any"])
def test_texts_that_do_not_fit_are_told_with_the_option_of_the_command(capsys, length):
    saved("model", tiny_llama(max_position_embeddings=128))
    with open("rows.jsonl", "w") as file:
        file.write(json.dumps({"prompt": "w1 w2 w3 w4 w5", "completion": "x"}) + "\n")
    run("--model_name_or_path", "model", "--judge", "rouge", "--max_new_tokens", length, status=2)
    error = capsys.readouterr().err
    assert "max_new_tokens" in error
    assert "max_completion_length" not in error


def test_several_texts_of_one_prompt_are_used_in_order(folder):
    rows = [{"prompt": "w1", "completion": text} for text in ("a", "b")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("--completions", "rows.jsonl", "--judge", "rouge")
    _, samples = result()
    assert [sample["completion"] for sample in samples] == ["a", "b"]
