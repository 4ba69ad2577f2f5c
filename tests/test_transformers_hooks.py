"""What is overridden of transformers.Trainer: in one file, and as the installed version has it."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer

from rloo_fast import RLOOTrainer
from rloo_fast.transformers_hooks import TransformersHooks

OWN = [cls for cls in RLOOTrainer.__mro__ if cls.__module__.startswith("rloo_fast.")]


def overridden(cls: type) -> list[str]:
    """Methods of `cls` that transformers.Trainer has too, but for __init__ and its like."""
    return [
        name
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and hasattr(Trainer, name) and not name.startswith("__")
    ]


HOOKS = overridden(TransformersHooks)


def test_private_methods_are_overridden_in_one_file_only():
    assert TransformersHooks in OWN
    elsewhere = [cls for cls in OWN if cls is not TransformersHooks]

    assert [n for cls in elsewhere for n in overridden(cls) if n.startswith("_")] == []
    assert len([name for name in HOOKS if name.startswith("_")]) >= 14


def test_every_method_of_the_hooks_overrides_one_of_transformers():
    methods = [name for name, value in vars(TransformersHooks).items() if inspect.isfunction(value)]

    assert set(methods) == set(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_an_override_takes_what_transformers_passes(name):
    ours, theirs = (
        [
            (p.name, p.kind, p.default)
            for p in inspect.signature(getattr(cls, name)).parameters.values()
        ]
        for cls in (TransformersHooks, Trainer)
    )

    assert ours == theirs


@pytest.mark.parametrize("name", HOOKS)
def test_every_override_has_its_reason(name):
    documented = [
        word.strip()
        for line in (TransformersHooks.__doc__ or "").splitlines()
        if ": " in line
        for word in line.split(": ")[0].split(",")
    ]

    assert name in documented
