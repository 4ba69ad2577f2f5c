"""Every path that a run is given or makes, in a folder whose name means something to others."""

from __future__ import annotations

import json

import datasets
import pytest

from rloo_fast import cli
from tests.support.commands import tiny_llama

NAME = "a[1] {b} %s ?*'\":=,#ü$HOME;&|\\~"
ROWS = [{"prompt": f"w{i} w2"} for i in range(4)]
REWARD = """
def score(completions, **kwargs):
    return [float(len(text)) for text in completions]

def keep(row):
    return {"prompt": row["prompt"]}
"""


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """The folder, and beside it one that the pattern in its name would find."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / NAME
    for place in (folder, tmp_path / NAME.replace("[1]", "1")):
        place.mkdir()
        (place / "re[1].py").write_text(REWARD if place == folder else "raise OSError")
        (place / "p[1].jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "p1.jsonl").write_text('{"prompt": ""}')
    tiny_llama(folder / "mo[1]del")
    (folder / "c[1].yaml").write_text("learning_rate: 1e-4\nuse_cpu: true\nbf16: false\n")
    (folder / "kw[1].json").write_text('{"bos_token_id": null}')
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "eval.parquet")
    (folder / "eval.parquet").rename(folder / "e[1].parquet")
    return folder


def ok(*argv: object) -> bool:
    return cli.main(list(map(str, argv))) == 0


def test_a_run_in_such_a_folder(odd, monkeypatch, capsys):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(odd / "tb[1]"))
    reward = f"{odd / 're[1].py'}:score"
    run = (
        "train", "--config", odd / "c[1].yaml", "--model_name_or_path", odd / "mo[1]del",
        "--dataset_name", odd / "p[1].jsonl", "--eval_dataset_name", odd / "e[1].parquet",
        "--eval_strategy", "steps", "--eval_steps", 1, "--reward_funcs", reward,
        "--dataset_map", f"{odd / 're[1].py'}:keep", "--generation_kwargs", odd / "kw[1].json",
        "--max_completion_length", 4, "--per_device_train_batch_size", 2,
        "--per_device_eval_batch_size", 2, "--save_steps", 1, "--logging_steps", 1,
        "--log_completions_csv", "--disable_tqdm",
    )  # fmt: skip
    out = odd / "o[1]ut"
    assert ok(*run, "--output_dir", out, "--max_steps", 1, "--report_to", "tensorboard")
    assert ok(*run, "--output_dir", out, "--max_steps", 2, "--report_to", "none",
              "--resume_from_checkpoint", out / "checkpoint-1")  # fmt: skip
    made = {path.name for path in out.iterdir()}
    assert {"checkpoint-1", "checkpoint-2", "README.md", "metrics.jsonl", "completions.csv"} <= made
    assert [*(odd / "tb[1]").rglob("events.*")]
    adapter = odd / "ad[1]"
    assert ok(*run, "--output_dir", adapter, "--max_steps", 1, "--use_peft", "--report_to", "none")
    assert ok(*run, "--output_dir", odd / "me[1]", "--max_steps", 1, "--report_to", "none",
              "--merge_adapter", adapter)  # fmt: skip
    assert ok("plot", out, adapter, "--output", odd / "c[1].png")
    assert ok("eval", "reward", "--model_name_or_path", out, "--dataset_name", odd / "p[1].jsonl",
              "--reward_funcs", reward, "--use_cpu", "--bf16", "false",
              "--max_completion_length", 4, "--output_dir", odd / "ev[1]")  # fmt: skip
    assert "4 prompts of" in capsys.readouterr().out
    assert {path.name for path in odd.parent.iterdir()} == {
        "cache", NAME, NAME.replace("[1]", "1")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 20_000, "cannot be read: it is nested more than 100 levels deep."),
        ('{"hidden_size": ' + "1" * 5000 + "}", "it has an integer of more than 4300 digits."),
        ('{"a": 1', "is not valid JSON: Expecting ',' delimiter in line 1, column 8."),
    ],
    ids=["depth", "digits", "cut"],
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_whose_settings_cannot_be_read(odd, capsys, file, text, sentence):
    (odd / "mo[1]del" / file).write_text(text)
    argv = ["train", "--model_name_or_path", odd / "mo[1]del", "--dataset_name", odd / "p[1].jsonl",
            "--reward_funcs", f"{odd / 're[1].py'}:score", "--output_dir", odd / "out",
            "--use_cpu", "--bf16", "false"]  # fmt: skip
    assert not ok(*argv)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("rloo-fast: error: ")
    assert line.endswith(sentence)
    assert file in line
