"""Commands and Python of all pages: options exist, targets exist, imports resolve, examples run."""

from __future__ import annotations

import importlib.util
import re

import pytest

from rloo_fast import RLOOConfig
from rloo_fast.cli import COMMANDS
from rloo_fast.cli.arguments import TrainArguments
from rloo_fast.cli.input import read_command_line
from rloo_fast.cli.options import options_of
from rloo_fast.cli.recipe_files import recipes
from rloo_fast.judges.arguments import JudgeArguments
from rloo_fast.sandbox import capabilities
from tests.support.pages import PAGES, code_blocks, commands, name_of
from tests.support.paths import ROOT

TEXTS = {name_of(page): page.read_text() for page in PAGES}
OPTIONS = {"train": options_of(TrainArguments, RLOOConfig), "judge": options_of(JudgeArguments)}
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = {*re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE)}


def after_our_command(words: list[str]) -> list[str] | None:
    """What follows `rloo-fast` or `-m rloo_fast`; None for another program."""
    for i, word in enumerate(words):
        if re.fullmatch(r"(.*/bin/)?rloo-fast", word) or words[i - 1 : i + 1] == [
            "-m",
            "rloo_fast",
        ]:
            return words[i + 1 :]
    return None


def named(pattern: str) -> list[str]:
    """What the group of a pattern finds in any page."""
    return sorted({x for text in TEXTS.values() for x in re.findall(pattern, text, re.MULTILINE)})


COMMAND_LINES = [
    (page, given)
    for page, text in TEXTS.items()
    for words in commands(text)
    if (given := after_our_command(words)) is not None
]
PYTHON = [
    (page, code)
    for page, text in TEXTS.items()
    if page != "docs/api.md"  # signatures
    for code in code_blocks(text, "python")
]


def shown(value: object) -> str:
    return " ".join(value)[:80] if isinstance(value, list) else str(value).splitlines()[0]


@pytest.mark.parametrize(("page", "given"), COMMAND_LINES, ids=shown)
def test_a_command_line_is_understood(page, given):
    command, *given = given
    assert command in COMMANDS
    if command == "eval":
        assert given.pop(0) == "judge"
        if given[:1] != ["--table"]:
            read_command_line(given, OPTIONS["judge"])
    if command == "train":
        read_command_line(given, OPTIONS["train"])


def test_there_are_command_lines_of_every_kind():
    assert {"train", "eval", "plan", "quickstart"} <= {given[0] for _, given in COMMAND_LINES}
    assert len(COMMAND_LINES) > 25


@pytest.mark.parametrize(
    "name", [*named(r"recipe:([a-z][\w/]*\w)"), *named(r"rloo-fast recipe ([a-z][\w/]+)\)")]
)
def test_a_recipe_exists(name):
    assert name in recipes()


@pytest.mark.parametrize("target", named(r"(?:`|^)(?:\w+=\S+ )*make ([a-z][\w-]*)"))
def test_a_target_exists(target):
    assert target in TARGETS


@pytest.mark.parametrize("module", named(r"python -m ((?:tests|benchmarks)\.[\w.]+\w)"))
def test_a_module_that_is_to_be_run_exists(module):
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=shown)
def test_python_compiles_and_what_it_imports_of_ours_is_there(page, code):
    compile(code, page, "exec")
    ours = [line for line in code.splitlines() if re.match(r"(from|import) rloo_", line)]
    exec("\n".join(ours), {})


def example(page: str, marker: str) -> str:
    (code,) = [code for code in code_blocks(TEXTS[page], "python") if marker in code]
    return code


def test_the_loss_example_runs_and_gives_gradients():
    names: dict = {}
    exec(example("docs/fused-loss.md", "print(out.advantages"), names)
    assert names["hidden"].grad.isfinite().all()
    assert names["lm_head"].grad.norm() > 0


def test_the_loop_that_reuses_samples_keeps_their_rewards():
    names: dict = {}
    exec(example("docs/fused-loss.md", "for iteration in range(3)"), names)
    first, *later = names["shaped_rewards"]
    assert all((first == shaped).all() for shaped in later)
    assert names["out"].log_ratio.abs().max() > 1e-4  # the policy has moved away from its samples


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_the_reward_example_scores(page):
    names: dict = {}
    exec(example(page, "def score"), names)
    assert names["score"](completions=[" 7", "8"], answer=["7", "9"]) == [1.0, 0.0]


def test_the_drop_in_example_names_what_exists():
    code = example("README.md", "RLOOTrainer(")
    names: dict = {}
    exec("\n".join(line for line in code.splitlines() if line.startswith("from ")), names)
    assert {"RLOOConfig", "RLOOTrainer", "Dataset"} <= names.keys()


def test_the_judge_function_prefers_the_shorter_text():
    names: dict = {}
    exec(example("docs/judging.md", "def shorter"), names)
    assert names["shorter"](["p"] * 3, [("a", "ab"), ("ab", "a"), ("a", "b")]) == [0, 1, None]


def test_the_sandbox_example_prints_its_verdict(capsys):
    if not capabilities()["available"]:
        pytest.skip("this machine cannot shut a program in")
    code = example("docs/sandbox.md", "def f(x)")
    exec(code, {})
    (said,) = re.findall(r"^# (.*)$", code, re.MULTILINE)
    assert capsys.readouterr().out.strip() == said
