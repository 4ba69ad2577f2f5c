"""Options read from source are those of the imported classes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rloo_fast.cli import options, source
from rloo_fast.cli.options import options_named, options_of
from rloo_fast.config.rloo_config import RLOOConfig
from rloo_fast.judges.arguments import JudgeArguments

PLACES = {
    "rloo_fast.config.rloo_config:RLOOConfig": RLOOConfig,
    "rloo_fast.judges.arguments:JudgeArguments": JudgeArguments,
}
COMPUTED = {"optim"}  # its default depends on torch's version


@pytest.mark.parametrize("place", PLACES)
def test_options_from_source_are_those_of_the_class(place):
    module, _, name = place.partition(":")
    read = options_of(source.from_source(module, name))
    real = options_of(PLACES[place])
    assert list(read) == list(real)
    for option in real.values():
        for what in ("optional", "choices", "default", "help", "owner", "expected"):
            if not (what == "default" and option.name in COMPUTED):
                assert getattr(read[option.name], what) == getattr(option, what), option.name


@pytest.mark.parametrize(
    "words",
    [
        "train --help", "train", "train --lerning_rate 1", "train --max_steps abc",
        "train --config quickstart --betaa 1", "eval --help", "eval judge --jugde x",
        "plan --help", "plan --modell x", "plot --help", "plot --kyes a",
        "quickstart --help", "quickstart --sede 1", "doctor --help", "doctor --jsn",
        "recipe --help", "recipe nothing",
    ],
)  # fmt: skip
def test_help_and_mistakes_do_not_wait_for_torch(words):
    code = (
        f"import sys; from rloo_fast.cli import main; main({words.split()!r}); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_what_the_source_does_not_say_is_imported(monkeypatch):
    def silent(module, name):
        raise source.SourceError("no")

    monkeypatch.setattr(options, "from_source", silent)
    place = "rloo_fast.judges.arguments:JudgeArguments"
    assert options_named(place) == options_of(JudgeArguments)


def test_a_module_that_needs_torch_is_a_source_error():
    with pytest.raises(source.SourceError):
        source.from_source("rloo_fast.judges.texts", "torch")
