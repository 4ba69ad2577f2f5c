"""`rloo-fast eval reward`, with a reward function of the user's."""

from __future__ import annotations

import json

from rloo_fast import cli
from tests.support.tiny import make_model, make_tokenizer


def test_the_mean_reward_of_a_file_of_prompts(tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    prompts = [json.dumps({"prompt": f"w{i}", "gold": float(i)}) for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    reward = "def gold_twice(completions, gold, **_):\n    return [2 * g for g in gold]\n"
    (tmp_path / "mine.py").write_text(reward)
    options = {
        "model_name_or_path": "model",
        "tokenizer_name_or_path": "tokenizer",
        "dataset_name": "prompts.jsonl",
        "reward_funcs": "mine.py:gold_twice",
    }
    words = [w for name, path in options.items() for w in (f"--{name}", str(tmp_path / path))]
    words += ["--use_cpu", "--bf16", "false", "--max_completion_length", "4"]
    assert cli.main(["eval", "reward", *words, "--per_device_eval_batch_size", "3"]) == 0
    said = capsys.readouterr().out
    assert "6 prompts of" in said
    (mean,) = [line.split()[1] for line in said.splitlines() if line.startswith("reward ")]
    assert float(mean) == 5.0


def test_there_are_two_kinds(capsys):
    assert cli.main(["eval", "rewards"]) == 2
    assert "two kinds, judge and reward" in capsys.readouterr().err
