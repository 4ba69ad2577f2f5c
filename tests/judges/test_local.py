"""Judges without a server: a reward model, and a function in a file."""

from __future__ import annotations

import pytest
from transformers import LlamaForSequenceClassification

from rloo_fast.judges.local import RewardModelJudge
from rloo_fast.rewards import load_reward_model
from tests.support.judge_runs import result, rows_file, run, saved, texts_file, tiny_llama


def test_earlier_texts_by_a_reward_model_in_both_orders(folder):
    saved("reward", tiny_llama(LlamaForSequenceClassification, num_labels=1))
    rows = rows_file()
    texts = [f" w{i + 3} w{i}" for i in range(11)] + [rows[11]["completion"]]
    texts_file("earlier.jsonl", texts, rows)
    run("--completions", "earlier.jsonl", "--judge", "reward_model", "--judge_model", "reward",
        "--both_orders", "--batch_size", "4")  # fmt: skip
    model = load_reward_model("reward")
    prompts = [row["prompt"] for row in rows]
    ours = model(prompts, texts)
    theirs = model(prompts, [row["completion"] for row in rows])
    wins = (ours > theirs)[:11].sum().item()
    found, _ = result()
    assert 0 < wins < 11
    assert found["figures"]["win_rate"] == pytest.approx(wins / 11)
    assert (found["figures"]["num_ties"], found["figures"]["num_decided"]) == (2, 11)
    assert found["figures"]["first_won"] == 0.5


def test_reward_model_that_reads_eos_finds_one_behind_every_text():
    saved("reward", tiny_llama(LlamaForSequenceClassification, num_labels=1))
    model = load_reward_model("reward", position="eos")
    [verdict] = RewardModelJudge(model)(["w1"], [(" w2", " w3 w4")])
    plain = load_reward_model("reward")
    assert verdict.answer is not None
    expected = plain(["w1", "w1"], [" w2 <eos>", " w3 w4 <eos>"]).tolist()
    assert [float(x) for x in verdict.answer.split()] == pytest.approx(expected, rel=1e-4)


def test_function_in_a_file_compares_two_sets_of_texts_without_references(folder):
    rows = rows_file()
    (folder / "mine.py").write_text(
        "def first_word(prompts, pairs):\n"
        "    return [None if a == b else int(b > a) for a, b in pairs]\n"
    )
    texts_file("a.jsonl", ["z"] * 9 + ["m"] * 3, rows)
    texts_file("b.jsonl", ["m"] * 12, rows)
    run("--completions", "a.jsonl", "--against", "b.jsonl", "--judge", "mine.py:first_word",
        "--reference_column", "none_there")  # fmt: skip
    found, _ = result()
    assert found["figures"]["win_rate"] == 1.0
    assert (found["figures"]["num_decided"], found["figures"]["num_no_verdict"]) == (9, 3)
    assert found["figures"]["rouge"] is None


def test_function_that_raises_is_one_sentence_and_the_texts_are_kept(folder, capsys):
    (folder / "mine.py").write_text("def f(prompts, pairs):\n    return [1 // 0]\n")
    texts_file("a.jsonl", ["x"] * 12, rows_file())
    run("--completions", "a.jsonl", "--judge", "mine.py:f", status=2)
    error = capsys.readouterr().err
    assert "the judge f raised ZeroDivisionError: " in error
    assert "(mine.py, line 2) (the texts are kept in out/samples.jsonl: the same comm" in error
    assert len(error.splitlines()) == 1
