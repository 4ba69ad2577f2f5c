"""A function run inside a module's forward, and forwards without an engine's hooks."""

from __future__ import annotations

import pytest
import torch

from rloo_fast.distributed.inside_forward import run_inside, without_hooks


def test_only_hooks_of_the_package_are_left_out_for_a_while():
    calls = []
    linear = torch.nn.Linear(2, 2)

    def theirs(*_):
        calls.append("theirs")

    theirs.__module__ = "engine.hooks"
    linear.register_forward_pre_hook(theirs)
    linear.register_forward_hook(lambda *_: calls.append("ours"))
    with without_hooks(linear, "engine"):
        linear(torch.ones(2))
    assert calls == ["ours"]
    linear(torch.ones(2))
    assert calls == ["ours", "theirs", "ours"]


def test_hooks_come_back_in_their_order_after_an_error():
    linear, calls = torch.nn.Linear(2, 2), []
    for number in range(3):
        hook = lambda *_, n=number: calls.append(n)  # noqa: E731
        hook.__module__ = "engine" if number == 1 else "ours"
        linear.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="planted"), without_hooks(linear, "engine"):
        raise RuntimeError("planted")
    linear(torch.ones(2))
    assert calls == [0, 1, 2]


def test_a_forward_that_fails_leaves_the_module_as_it_was():
    linear = torch.nn.Linear(2, 2)

    def fail():
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        run_inside(linear, linear, fail)
    assert "forward" not in vars(linear)
    assert linear(torch.ones(2)).shape == (2,)
