"""Mistakes in the options of `rloo-fast eval judge`, and its help."""

from __future__ import annotations

import pytest

from rloo_fast import cli
from tests.support.judge_runs import rows_file, run, texts_file

TEXTS_FROM = ("--completions", "a.jsonl")

ROUGE = (*TEXTS_FROM, "--judge", "rouge")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--judge", "rouge"), "one of --model_name_or_path and --completions"),
        ((*TEXTS_FROM, "--judge", "gpt"), "got 'gpt'"),
        ((*TEXTS_FROM, "--judge", "openai"), "--judge openai needs --judge_base_url"),
        ((*ROUGE, "--judge_model", "m"), "--judge_model is not read by --judge rouge"),
        ((*ROUGE, "--num_prompts", "0"), "--num_prompts must be >= 1"),
        ((*ROUGE, "--judge_timeout_s", "nan"), "--judge_timeout_s > 0"),
        ((*ROUGE, "--judge_timeout_s", "inf"), "--judge_timeout_s > 0"),
        ((*ROUGE, "--temperature", "nan"), "--temperature must be >= 0"),
        ((*ROUGE, "--reference_column", "summary"), "no column 'summary' of references"),
        ((*ROUGE, "--against", "none.jsonl"), "texts none.jsonl: there is no such file"),
        ((*ROUGE, "--against", "./nowhere"), "there is no such directory"),
        (("--completions", "short.jsonl", "--judge", "rouge"), "no line for the prompt 'w5 w2'"),
        (("--completions", "bad.jsonl", "--judge", "rouge"), "bad.jsonl, line 2: expected an obj"),
        ((*TEXTS_FROM, "--judge", "nowhere.py:f"), "could not be loaded: FileNotFoundError"),
        ((*TEXTS_FROM, "--judge", "json:nothing"), "there is no function 'nothing' there"),
        ((*ROUGE, "--judge_promt", "x"), "did you mean --judge_prompt?"),
        ((*ROUGE, "--zzz", "x"), "`rloo-fast eval judge --help` lists every one"),
        ((*ROUGE, "--output_dir", "done"), "done holds a result already"),
        (
            (*TEXTS_FROM, "--judge", "openai", "--judge_model", "m", "--judge_base_url",
             "http://h/v1", "--judge_prompt", "p.txt"),
            "{text0}, {text1} is not there",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(folder, capsys, argv, sentence):
    rows = rows_file()
    texts_file("a.jsonl", ["x"] * 12, rows)
    texts_file("short.jsonl", ["x"] * 5, rows[:5])
    (folder / "bad.jsonl").write_text('{"prompt": "w0 w2", "completion": "x"}\n{"prompt": "p"}\n')
    (folder / "p.txt").write_text("Which? {prompt}")
    (folder / "done").mkdir()
    (folder / "done" / "result.json").write_text("{}")
    run(*argv, status=2)
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_help_names_every_option(capsys):
    assert cli.main(["eval", "judge", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("judge_base_url", "both_orders", "table"))
    assert max(map(len, shown.splitlines())) <= 120
