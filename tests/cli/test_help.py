"""The help of `rloo-fast train`."""

from __future__ import annotations

from rloo_fast import cli
from rloo_fast.cli.help import SECTIONS
from tests.support.commands import OPTIONS


def test_train_help_fits_a_screen_and_a_terminal(capsys):
    assert cli.main(["train", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 62
    assert max(map(len, lines)) <= 100


def test_train_help_shows_sections_defaults_and_the_way_to_the_rest(capsys):
    cli.main(["train", "--help"])
    printed = capsys.readouterr().out
    assert all(f"\n{section}:" in printed for section in SECTIONS)
    assert "[1e-06]" in printed
    assert "--help all" in printed


def test_help_all_lists_every_option_that_does_something(capsys):
    cli.main(["train", "--help", "all"])
    printed = capsys.readouterr().out
    offered = {name for name, o in OPTIONS.items() if o.help != "Not offered yet."}
    assert {name for name in offered if f"\n  --{name}:" not in printed} == set()
    assert "--use_transformers_paged" not in printed
