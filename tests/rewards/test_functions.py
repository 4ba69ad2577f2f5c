"""What reward functions get and may return, their errors, and how rewards are combined."""

import asyncio
import functools
import logging
import math
import threading

import numpy as np
import pytest
import torch

from rloo_fast.rewards import RewardError, load_reward_functions
from rloo_fast.rewards.values import read_values
from tests.support.rewards import (
    CHAT_COMPLETIONS,
    CHAT_PROMPTS,
    COMPLETIONS,
    IDS,
    NAN,
    PROMPTS,
    assert_same,
    returns,
    score,
)


@pytest.mark.parametrize("chat", [False, True], ids=["standard", "conversational"])
def test_function_gets_the_contract_keywords_and_the_columns(chat):
    got = {}

    def reward(**kwargs):
        got.update(kwargs)
        return [0.0] * 3

    columns = {"answer": [1, 2, 3], "prompt": ["x"] * 3, "completion": ["y"] * 3}
    score(reward, columns, chat=chat)
    assert got.pop("log_extra") is not None
    assert got.pop("log_metric") is not None
    assert got == {
        "prompts": CHAT_PROMPTS if chat else PROMPTS,
        "completions": CHAT_COMPLETIONS if chat else COMPLETIONS,
        "completion_ids": IDS,
        "trainer_state": "state",
        "answer": [1, 2, 3],
    }


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.5, None],
        (1, 2.5, None),
        iter([1, 2.5, None]),
        {"a": 1, "b": 2.5, "c": None}.values(),
        [np.float32(1), np.array(2.5), None],
        [torch.tensor(1), torch.tensor([2.5]), None],
        np.array([1, 2.5, None], dtype=object),
        [True, 2.5, None],
    ],
    ids=["list", "tuple", "iterator", "view", "numpy", "tensors", "object-array", "bool"],
)
def test_any_iterable_of_numbers_and_none_is_read(value):
    assert_same(score(returns(value)), [[1.0], [2.5], [NAN]])


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.0, 2.0, 0.0], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([1, 2, 0]),
        np.array([1.0, 2.0, 0.0]),
        np.array([0, 2, 1], dtype=np.uint8)[::-1],
    ],
    ids=["bf16", "int64", "numpy", "reversed-uint8"],
)
def test_tensor_and_array_are_read(value):
    rewards = score(returns(value))
    assert_same(rewards, [[1.0], [2.0], [0.0]])
    assert not rewards.requires_grad


class CountReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what would each be a device-to-host copy, were the tensor on a GPU."""

    def __init__(self):
        super().__init__()
        self.num_elements_read = self.num_copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_elements_read += func is torch.ops.aten._local_scalar_dense.default
        self.num_copies += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_tensor_is_read_with_one_copy(dtype, requires_grad):
    values = torch.rand(3, dtype=dtype, requires_grad=requires_grad)
    with CountReads() as counted:
        read_values(values, "f", PROMPTS, COMPLETIONS)
    assert (counted.num_copies, counted.num_elements_read) == (1, 0)


def test_builtin_names_and_models_and_functions_mix_in_order(reward_model_dir):
    rewards = load_reward_functions(["exact_match", str(reward_model_dir), returns([0, 0, 0])])
    assert rewards.names == ["exact_match", "tiny-reward", "fixed"]


def test_equal_names_become_unique():
    rewards = load_reward_functions([returns([0]), returns([0]), functools.partial(returns([0]))])
    assert rewards.names == ["fixed", "fixed_2", "fixed_3"]


def test_log_extra_and_log_metric_reach_the_trainer():
    extra, metrics = {}, {}

    def reward(completions, log_extra, log_metric, **kwargs):
        log_extra("length", [len(c) for c in completions])
        log_metric("mean_length", 4.0)
        return [0.0] * 3

    score(reward, log_extra=extra.__setitem__, log_metric=metrics.__setitem__)
    assert (extra, metrics) == ({"length": [3, 5, 4]}, {"mean_length": 4.0})


def test_functions_may_log_when_nobody_listens():
    def reward(log_extra, **kwargs):
        log_extra("x", [1, 2, 3])
        return [0.0] * 3

    assert_same(score(reward), [[0.0]] * 3)


def test_what_functions_log_arrives_in_their_order_in_the_callers_thread():
    got = []

    def log_metric(name, value):
        got.append((name, value, threading.current_thread()))

    async def in_loop(log_metric, **kwargs):
        await asyncio.sleep(0.1)
        log_metric("a", 1)
        return [0.0] * 3

    def here(log_metric, **kwargs):
        log_metric("b", torch.tensor(2.0))
        return [0.0] * 3

    score([in_loop, here], log_metric=log_metric)
    assert got == [("a", 1.0, threading.current_thread()), ("b", 2.0, threading.current_thread())]


# --- combining


def test_weights_sum_over_the_functions_that_apply():
    funcs = [returns([1.0, None, None]), returns([2.0, 3.0, None]), returns([4.0, None, None])]
    rewards = load_reward_functions(funcs, weights=[0.5, -1.0, 2.0])
    table = rewards(PROMPTS, COMPLETIONS, IDS, {})
    # 0.5*1 - 1*2 + 2*4, -1*3, nothing
    assert_same(rewards.combine(table), [6.5, -3.0, NAN])


def test_weights_default_to_one():
    rewards = load_reward_functions([returns([1, 2, 3]), returns([10, 20, 30])])
    assert_same(rewards.combine(rewards(PROMPTS, COMPLETIONS, IDS, {})), [11.0, 22.0, 33.0])


def test_combine_refuses_another_number_of_functions():
    with pytest.raises(ValueError, match=r"\(B, 1\), got \(3, 2\)"):
        load_reward_functions(returns([])).combine(torch.zeros(3, 2))


def test_samples_without_any_reward_are_warned_about_once(caplog):
    with caplog.at_level(logging.WARNING):
        score([returns([1, None, None]), returns([None, None, None])])
    (record,) = caplog.records
    assert "2 of 3 completions" in record.getMessage()
    assert "{'prompt': 'two plus one', 'completion': 'three'}" in record.getMessage()


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [([1.0], r"weights \(1\) must match .* \(2\)"), ([1.0, NAN], "must be finite")],
)
def test_bad_weights_are_refused(weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_reward_functions([returns([]), returns([])], weights=weights)


# --- errors of functions


def test_raising_function_is_named_and_chained():
    def broken(**kwargs):
        raise KeyError("gold")

    with pytest.raises(RewardError, match=r"'broken' raised KeyError: 'gold'") as info:
        score([returns([0, 0, 0]), broken])
    assert isinstance(info.value.__cause__, KeyError)


def test_raising_generator_is_named():
    def lazy(**kwargs):
        yield 1.0
        raise KeyError("gold")

    with pytest.raises(RewardError, match="'lazy' raised KeyError"):
        score(lazy)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([1.0, 2.0], "returned 2 rewards, but 3 were expected"),
        ([1.0] * 4, "returned 4 rewards, but 3 were expected"),
        (torch.zeros(2), "returned 2 rewards, but 3 were expected"),
        (torch.zeros(3, 1), r"shape \(3,\), got a torch.float32 tensor of shape \(3, 1\)"),
        (torch.tensor(1.0), r"of shape \(\)"),
        (torch.zeros(3, dtype=torch.complex64), "real numbers"),
        ([0.0, NAN, 0.0], r"returned nan for sample 1 \(prompt 'two plus one'.*return None"),
        ([0.0, 0.0, math.inf], "returned inf for sample 2"),
        ([0.0, 0.0, 10**400], "returned inf for sample 2"),
        (torch.tensor([0.0, -math.inf, 0.0]), "returned -inf for sample 1"),
        (np.array([NAN, 0.0, 0.0]), "returned nan for sample 0"),
        ([0.0, "1.0", 0.0], r"returned '1.0' \(str\), not a number or None, for sample 1"),
        ([[0.0], [0.0], [0.0]], r"returned \[0.0\] \(list\).* for sample 0"),
        (np.array(["a", "b", "c"]), r"\(str\).* for sample 0"),
        ("abc", "got str"),
        ({"a": 1.0}, "got dict"),
        (1.0, "got float"),
        (None, "got NoneType. Is a `return` missing"),
    ],
    ids=lambda v: str(v)[:30].replace("\n", " "),
)
def test_wrong_return_values_are_refused(value, sentence):
    with pytest.raises(ValueError, match=f"Reward function 'fixed'.*{sentence}"):
        score(returns(value))


def test_endless_iterator_is_refused():
    def endless(**kwargs):
        while True:
            yield 0.0

    with pytest.raises(ValueError, match="returned 4 rewards"):
        score(endless)


def test_conversational_sample_is_shown_by_its_text():
    with pytest.raises(ValueError, match=r"sample 1 \(prompt 'two plus one', completion 'three'\)"):
        score(returns([0.0, NAN, 0.0]), chat=True)


def test_long_sample_is_shortened_in_the_error():
    rewards = load_reward_functions(returns([NAN]))
    with pytest.raises(ValueError, match="nan") as info:
        rewards(["p" * 5000], ["c" * 5000], [[1]], {})
    assert len(str(info.value)) < 400


# --- signatures and columns


def test_missing_kwargs_are_refused_at_load_with_the_fix():
    def reward(completions, answer=None):
        return []

    fix = r"Write: def reward\(completions, answer=None, \*\*kwargs\)"
    with pytest.raises(ValueError, match=f"`completion_ids`, .*{fix}"):
        load_reward_functions(reward)


def test_positional_only_parameter_is_refused():
    def reward(completions, /, **kwargs):
        return []

    with pytest.raises(ValueError, match="positional-only"):
        load_reward_functions(reward)


def test_function_without_kwargs_is_refused_a_column_it_does_not_take():
    def reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric):
        return [0.0] * 3

    assert_same(score(reward), [[0.0]] * 3)
    with pytest.raises(ValueError, match=r"'reward' is also called with `answer`"):
        score(reward, {"answer": [1, 2, 3]})


def test_missing_column_is_named_before_anything_runs():
    rewards = load_reward_functions("exact_match")
    with pytest.raises(ValueError, match=r"'exact_match' needs `answer`.*it has `gold`, `level`"):
        rewards.check_columns(["prompt", "level", "gold"])


def test_column_with_a_reserved_name_is_refused():
    with pytest.raises(ValueError, match="`prompts` have the names of keywords"):
        score(returns([0, 0, 0]), {"prompts": [1, 2, 3]})


def test_column_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"3 prompts, but other lengths: .*'answer'.*2"):
        score("exact_match", {"answer": ["two", "three"]})
