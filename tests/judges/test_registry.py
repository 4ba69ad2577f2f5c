"""One table of judges, which the command's help and checks read."""

from __future__ import annotations

import operator

import pytest

from rloo_fast import cli
from rloo_fast.judges import registry
from rloo_fast.judges.arguments import JudgeArguments, check
from rloo_fast.judges.registry import (
    JUDGES,
    JudgeKind,
    JudgeSettings,
    judge_kind,
    refused_options,
)


def test_help_names_every_judge(capsys):
    assert cli.main(["eval", "judge", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(JUDGES)}, module:function or file.py:function" in shown


@pytest.mark.parametrize("name", JUDGES)
def test_options_of_a_judge_are_fields_of_the_command(name):
    kind = JUDGES[name]
    assert {*kind.needs, *kind.takes} <= JudgeArguments.__dataclass_fields__.keys()
    assert not {*kind.needs, *kind.takes} & {*refused_options(kind)}


def test_a_new_row_is_checked_by_its_own_options(monkeypatch):
    longer = JudgeKind(lambda _: lambda prompts, pairs: [0] * len(pairs), takes=("judge_marker",))
    monkeypatch.setitem(registry.JUDGES, "longer", longer)
    given = {"completions": "a.jsonl", "dataset_name": "d", "output_dir": "out", "judge": "longer"}
    check(JudgeArguments(**given, judge_marker="So:"))
    with pytest.raises(ValueError, match="--judge_model is not read by --judge longer"):
        check(JudgeArguments(**given, judge_model="m"))


def test_a_name_with_a_colon_is_a_function():
    kind = judge_kind("operator:eq")
    assert kind.make(JudgeSettings()) is operator.eq
    assert {"judge_model", "judge_prompt"} <= {*refused_options(kind)}


def test_references_that_are_what_texts_are_compared_with_leave_rouge_nothing_to_judge():
    assert JUDGES["rouge"].make(JudgeSettings(references=None)) is None
    assert JUDGES["rouge"].make(JudgeSettings(references={"p": ["a"]})) is not None
