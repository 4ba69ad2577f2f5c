"""Rewards: the contract of reward functions, its errors, reward models, builtins."""

import asyncio
import functools
import logging
import math
import pickle
import sys
import threading
import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast as FastTokenizer

from rloo_fast.rewards import RewardError, RewardTimeout, load_reward_functions
from rloo_fast.rewards.builtin import (
    Format,
    accuracy,
    completion_text,
    exact_match,
    format_think,
)
from rloo_fast.rewards.files import files_of
from rloo_fast.rewards.values import read_values

PROMPTS = ["one plus one", "two plus one", "one plus three"]
COMPLETIONS = ["two", "three", "four"]
IDS = [[1], [2, 2], [3, 3, 3]]
CHAT_PROMPTS = [[{"role": "user", "content": p}] for p in PROMPTS]
CHAT_COMPLETIONS = [[{"role": "assistant", "content": c}] for c in COMPLETIONS]
NAN = math.nan


def score(reward_funcs, columns=None, chat=False, log_extra=None, log_metric=None, **load):
    rewards = load_reward_functions(reward_funcs, **load)
    prompts, completions = (CHAT_PROMPTS, CHAT_COMPLETIONS) if chat else (PROMPTS, COMPLETIONS)
    try:
        return rewards(
            prompts,
            completions,
            IDS,
            columns or {},
            trainer_state="state",
            log_extra=log_extra,
            log_metric=log_metric,
        )
    finally:
        rewards.close()


def returns(value):
    def fixed(**kwargs):
        return value

    return fixed


def assert_same(rewards, expected):
    torch.testing.assert_close(rewards, torch.tensor(expected), equal_nan=True, rtol=0, atol=0)


# --- what functions get and may return


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
    assert "sample 1 (prompt 'two plus one', completion 'three')" in record.getMessage()


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [([1.0], "got 1 weights for 2 functions"), ([1.0, NAN], "must be finite")],
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
        ([1.0, 2.0], "returned 2 rewards for 3 completions"),
        ([1.0] * 4, "returned 4 rewards for 3 completions"),
        (torch.zeros(2), "returned 2 rewards for 3 completions"),
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


# --- async


class AsyncJudge:
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]


async def async_length(completions, scale=1.0, **kwargs):
    await asyncio.sleep(0)
    return (scale * len(c) for c in completions)


@pytest.mark.parametrize(
    "judge",
    [
        async_length,
        AsyncJudge(),
        AsyncJudge().__call__,
        functools.partial(functools.partial(async_length), scale=1.0),
    ],
    ids=["function", "object", "method", "partial"],
)
def test_async_callables_are_awaited(judge):
    assert_same(score(judge), [[3.0], [5.0], [4.0]])


def test_async_functions_run_at_the_same_time():
    async def slow(**kwargs):
        await asyncio.sleep(0.3)
        return [0.0] * 3

    start = time.monotonic()
    score([slow, slow])
    assert time.monotonic() - start < 0.55


def test_async_functions_run_on_one_daemon_thread_that_close_ends():
    async def thread(**kwargs):
        seen.append(threading.current_thread())
        return [0.0] * 3

    seen = []
    rewards = load_reward_functions([thread, thread])
    rewards(PROMPTS, COMPLETIONS, IDS, {})
    rewards(PROMPTS, COMPLETIONS, IDS, {})
    rewards.close()
    assert len(set(seen)) == 1
    assert seen[0].daemon
    assert not seen[0].is_alive()


def test_closed_rewards_can_be_used_again():
    rewards = load_reward_functions(AsyncJudge())
    rewards(PROMPTS, COMPLETIONS, IDS, {})
    rewards.close()
    assert_same(rewards(PROMPTS, COMPLETIONS, IDS, {}), [[3.0], [5.0], [4.0]])
    rewards.close()


@pytest.mark.parametrize("error", [KeyError("gold"), SystemExit(1), asyncio.CancelledError()])
def test_raising_async_function_is_named(error):
    async def broken(**kwargs):
        raise error

    with pytest.raises(RewardError, match=f"'broken' raised {type(error).__name__}"):
        score(broken)


def test_failure_cancels_the_async_functions_that_still_run():
    cancelled = threading.Event()

    async def slow(**kwargs):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    rewards = load_reward_functions([slow, returns(None)])
    with pytest.raises(ValueError, match="'fixed' must return"):
        rewards(PROMPTS, COMPLETIONS, IDS, {})
    assert cancelled.wait(5)
    rewards.close()


def test_hidden_coroutine_is_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"got coroutine.*async def"):
        score(lambda **kwargs: async_length(**kwargs))


# --- time limits


def test_hung_function_times_out():
    release = threading.Event()

    def hung(**kwargs):
        release.wait(30)

    start = time.monotonic()
    with pytest.raises(RewardTimeout, match=r"'hung' still ran after 0\.2 s"):
        score([returns([0, 0, 0]), hung], timeout_s=0.2)
    release.set()
    assert time.monotonic() - start < 5


def test_hung_async_function_times_out():
    async def hung(**kwargs):
        await asyncio.sleep(30)

    async def quick(**kwargs):
        return [0.0] * 3

    with pytest.raises(RewardTimeout, match=r"function 'hung' still ran after 0\.2 s\.$"):
        score([hung, quick], timeout_s=0.2)


def test_async_function_that_blocks_the_loop_times_out():
    release = threading.Event()

    async def blocking(**kwargs):
        release.wait(30)

    with pytest.raises(RewardTimeout, match=r"'blocking' still ran.*blocking work"):
        score(blocking, timeout_s=0.2)
    release.set()


def test_functions_own_timeout_error_is_not_taken_for_ours():
    async def client(**kwargs):
        raise TimeoutError("server")

    with pytest.raises(RewardError, match="'client' raised TimeoutError: server") as info:
        score(client, timeout_s=30.0)
    assert not isinstance(info.value, RewardTimeout)


def test_functions_in_time_return_and_raise_as_without_limit():
    def broken(**kwargs):
        raise KeyError("gold")

    assert_same(
        score([returns([1, 2, None]), AsyncJudge()], timeout_s=30.0),
        [
            [1.0, 3.0],
            [2.0, 5.0],
            [NAN, 4.0],
        ],
    )
    with pytest.raises(RewardError, match="'broken' raised KeyError"):
        score(broken, timeout_s=30.0)


def test_time_limit_must_be_positive():
    with pytest.raises(ValueError, match="> 0 seconds or None, got 0"):
        load_reward_functions(returns([]), timeout_s=0)


# --- names


def test_function_in_a_module_and_in_a_file(tmp_path, monkeypatch):
    code = "def longer(completions, **kwargs):\n    return [len(c) for c in completions]\n"
    (tmp_path / "my_rewards_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    names = ["my_rewards_module:longer", f"{tmp_path / 'my_rewards_module.py'}:longer"]
    assert_same(score(names), [[3.0, 3.0], [5.0, 5.0], [4.0, 4.0]])


def test_functions_of_a_file_share_its_globals(tmp_path):
    file = tmp_path / "shared.py"
    file.write_text(
        "seen = []\n"
        "def first(**kwargs):\n    seen.append(7)\n    return [0.0] * 3\n"
        "def second(**kwargs):\n    return seen * 3\n"
    )
    assert_same(score([f"{file}:first", f"{file}:second"]), [[0.0, 7.0]] * 3)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("exact_mach", "Did you mean 'exact_match'"),
        ("accuracy_reward", "Did you mean 'accuracy'"),
        ("gpt2", "an existing directory with a reward model, or a hub id 'org/name'"),
        ("math.fabs", "written math:fabs"),
        ("./no/such/directory", "is not a reward"),
        ("math:no_such", "no function 'no_such' there"),
        ("no_such_module_x:f", "could not be imported: ModuleNotFoundError"),
        ("no_such_file.py:f", "does not exist"),
    ],
)
def test_names_of_nothing_are_refused(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_reward_functions(name)


def test_broken_file_is_refused_with_its_error(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match="could not be loaded: ZeroDivisionError"):
        load_reward_functions(f"{tmp_path}/broken.py:f")


def test_missing_function_lists_those_of_the_file(tmp_path):
    (tmp_path / "few.py").write_text("import math\ndef good(**kwargs): ...\nx = 1\n")
    with pytest.raises(ValueError, match=r"no function 'x' there. Its functions: good\."):
        load_reward_functions(f"{tmp_path}/few.py:x")


@pytest.mark.parametrize(
    ("value", "sentence"), [(3, "got int: 3"), ([], "At least one")], ids=["int", "empty"]
)
def test_what_is_no_reward_is_refused(value, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_reward_functions(value)


# --- arguments of rewards that are named, and what runs the model's programs

FILE = """
class Scaled:
    def __init__(self, scale=1.0):
        self.scale = scale
    def __call__(self, completions, **kwargs):
        return [self.scale * len(c) for c in completions]

def plus(completions, amount=0, *, offset=0, **kwargs):
    return [amount + offset] * len(completions)

class Runs(Scaled):
    executes_model_code = True

def runs(completions, **kwargs):
    return [0.0] * len(completions)
runs.executes_model_code = True
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "given.py").write_text(FILE)
    return str(tmp_path / "given.py")


def test_arguments_reach_functions_and_make_objects_of_classes(file):
    plus, scaled = f"{file}:plus", f"{file}:Scaled"
    kwargs = {plus: {"amount": 7, "offset": 1}, scaled: {"scale": 2}}
    rewards = load_reward_functions([plus, scaled], reward_kwargs=kwargs)
    assert rewards.names == ["plus", "Scaled"]
    assert_same(rewards(PROMPTS, COMPLETIONS, IDS, {}), [[8.0, 6.0], [8.0, 10.0], [8.0, 8.0]])


def test_a_class_without_arguments_is_made_an_object_too(file):
    assert_same(score(f"{file}:Scaled"), [[3.0], [5.0], [4.0]])


def test_what_has_arguments_can_go_to_worker_processes(file):
    names = [f"{file}:plus", f"{file}:Scaled"]
    kwargs = {names[0]: {"amount": 3}, names[1]: {"scale": 2}}
    rewards = load_reward_functions(names, reward_kwargs=kwargs, processes=1)  # pickled by then
    functions = [f.function for f in rewards.functions]
    assert list(files_of(functions).values()) == [file]
    again = pickle.loads(pickle.dumps(functions))
    assert [f(completions=["abc"]) for f in again] == [[3], [6]]


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"lenght": {}}, "reward_kwargs has 'lenght', but reward_funcs has 'length'"),
        ({"length": 200}, "dict of dicts.*'length' has 200"),
        ({"length": {"tagret": 2}}, r"takes no 'tagret'. It takes 'target', 'limit'\."),
        ({"length": {"target": 5, "limit": 5}}, "0 <= target < limit is needed, got 5 and 5"),
        ({"length": {"target": "5"}}, "'length' could not be made with reward_kwargs"),
        ({}, "missing 1 required positional argument: 'target'"),
    ],
    ids=["name", "no-dict", "argument", "range", "text", "missing"],
)
def test_wrong_arguments_are_refused_at_load(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_reward_functions(["length"], reward_kwargs=kwargs)


def test_arguments_for_objects_are_refused():
    with pytest.raises(ValueError, match=r"has no names, only objects \(use functools.partial\)"):
        load_reward_functions(returns([]), reward_kwargs={"fixed": {}})


def test_an_argument_that_is_a_column_as_well_is_refused(file):
    name = f"{file}:plus"
    with pytest.raises(ValueError, match="'plus' is given `amount` twice"):
        score(name, {"amount": [1, 2, 3]}, reward_kwargs={name: {"amount": 3}})


@pytest.mark.parametrize("name", ["Runs", "runs"])
def test_a_name_that_runs_the_models_programs_needs_the_flag(name, file):
    with pytest.raises(ValueError, match=rf"{name}' runs programs .* execute_model_code=True"):
        load_reward_functions(f"{file}:{name}")
    assert load_reward_functions(f"{file}:{name}", execute_model_code=True).names == [name]


def test_an_object_that_runs_the_models_programs_is_allowed_by_being_passed():
    function = returns([0.0] * 3)
    function.executes_model_code = True
    assert_same(score(function), [[0.0]] * 3)


# --- reward models

SPECIAL = ["<unk>", "</s>", "<pad>", "user", "assistant", ":"]
WORDS = [*SPECIAL, *sorted(set(" ".join(PROMPTS + COMPLETIONS).split()))]
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"


def make_tokenizer(**special):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return FastTokenizer(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def make_model(num_labels=1, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=num_labels,
        attention_dropout=0.5,
    )
    return LlamaForSequenceClassification(config)


@pytest.fixture(scope="module")
def reward_model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-reward"
    make_model().save_pretrained(path)
    make_tokenizer(eos_token="</s>", chat_template=TEMPLATE).save_pretrained(path)
    return path


def one_by_one(model, tokenizer, texts):
    """logits[0, 0] of each text on its own."""
    values = []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            values.append(model.eval()(input_ids=ids).logits[0, 0])
    return torch.stack(values)


def assert_close(rewards, expected):
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-6)


def test_reward_model_directory_scores_prompt_plus_completion(reward_model_dir):
    # No space between prompt and completion: the words at the seam are one unknown word.
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = one_by_one(make_model(), make_tokenizer(), texts)
    assert_close(score(str(reward_model_dir))[:, 0], expected)


def test_reward_model_applies_its_chat_template(reward_model_dir):
    texts = [
        f"user : {p} </s> assistant : {c} </s> " for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    model, tokenizer = make_model(), make_tokenizer(eos_token="</s>")
    model.config.pad_token_id = tokenizer.eos_token_id  # as no pad token is defined
    assert_close(score(str(reward_model_dir), chat=True)[:, 0], one_by_one(model, tokenizer, texts))


def test_chat_template_gets_its_kwargs(reward_model_dir):
    tokenizer = make_tokenizer(eos_token="</s>", chat_template="{{ word }}")
    rewards = score(
        make_model(), chat=True, processing_classes=tokenizer, chat_template_kwargs={"word": "two"}
    )
    assert_close(rewards[:, 0], one_by_one(make_model(), tokenizer, ["two"] * 3))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("special", [{"pad_token": "<pad>"}, {"eos_token": "</s>"}])
def test_batches_equal_one_by_one(batch_size, special):
    generator = torch.Generator().manual_seed(1)
    texts = [
        " ".join(WORDS[i] for i in torch.randint(3, len(WORDS), (n,), generator=generator))
        for n in (5, 1, 17, 2, 9, 9, 3, 30, 1, 4)
    ]
    model, tokenizer = make_model(), make_tokenizer(**special)
    rewards = load_reward_functions(model, tokenizer, batch_size=batch_size)
    got = rewards([""] * 10, texts, [[]] * 10, {})[:, 0]
    assert_close(got, one_by_one(make_model(), tokenizer, texts))
    assert len(set(got.tolist())) > 5


def test_batches_are_right_padded_without_special_tokens_and_bounded():
    model = make_model()
    tokenizer = make_tokenizer(pad_token="<pad>", padding_side="left")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 1)]
    )
    seen, forward = [], model.forward

    def spy(**inputs):
        output = forward(**inputs)
        seen.append((inputs["input_ids"].tolist(), output.past_key_values))
        assert torch.is_inference_mode_enabled()
        return output

    model.forward = spy
    rewards = load_reward_functions(model, tokenizer, batch_size=2)
    rewards([""] * 3, ["user", "user user user", "user user"], [[]] * 3, {})
    assert seen == [([[3, 3, 3], [3, 3, 2]], None), ([[3]], None)]


@pytest.mark.parametrize(
    ("special", "pad_id"),
    [({"pad_token": "<pad>", "eos_token": "</s>"}, 2), ({"eos_token": "</s>"}, 1)],
)
def test_model_gets_the_tokenizers_pad_token_or_its_eos(special, pad_id):
    model = make_model()
    load_reward_functions(model, make_tokenizer(**special))
    assert model.config.pad_token_id == pad_id


def test_first_label_of_several_is_the_reward():
    model, tokenizer = make_model(num_labels=3), make_tokenizer(pad_token="<pad>")
    expected = one_by_one(
        model, tokenizer, [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    )
    assert_close(score(model, processing_classes=tokenizer)[:, 0], expected)


def test_model_without_label_column_is_refused():
    model = LlamaForCausalLM(make_model().config)  # logits (batch, tokens, vocabulary)
    tokenizer = make_tokenizer(pad_token="<pad>")
    with pytest.raises(ValueError, match=r"'LlamaForCausalLM' must return logits of shape"):
        score(model, processing_classes=tokenizer)


def test_reward_model_runs_in_eval_mode_without_gradients():
    model = make_model().train()
    tokenizer = make_tokenizer(pad_token="<pad>")
    rewards = load_reward_functions(model, tokenizer)
    model.train()  # as a careless callback would
    first = rewards(PROMPTS, COMPLETIONS, IDS, {})
    assert_same(first, rewards(PROMPTS, COMPLETIONS, IDS, {}).tolist())
    assert not first.requires_grad


def test_module_from_a_directory_finds_its_tokenizer(reward_model_dir):
    model = LlamaForSequenceClassification.from_pretrained(reward_model_dir)
    rewards = load_reward_functions([returns([0, 0, 0]), model])
    assert rewards.names == ["fixed", "tiny-reward"]
    assert rewards.models == [model]
    assert_close(rewards(PROMPTS, COMPLETIONS, IDS, {})[:, 1:], score(str(reward_model_dir)))


def test_models_can_be_moved_and_replaced():
    rewards = load_reward_functions(make_model(), make_tokenizer(pad_token="<pad>"))
    before = rewards(PROMPTS, COMPLETIONS, IDS, {})
    other = make_model(seed=1)
    other.config.pad_token_id = 2
    rewards.models = [other]
    assert rewards.to("cpu").models == [other]
    assert not torch.equal(rewards(PROMPTS, COMPLETIONS, IDS, {}), before)


def test_language_model_checkpoint_is_refused_as_a_reward_model(tmp_path):
    LlamaForCausalLM(make_model().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a trained reward model: its checkpoint lacks score"):
        load_reward_functions(str(tmp_path))


def test_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="could not be loaded"):
        load_reward_functions(str(tmp_path))


def test_raising_model_is_named(reward_model_dir):
    rewards = load_reward_functions(str(reward_model_dir))
    rewards.models[0].forward = lambda **kwargs: 1 / 0
    with pytest.raises(RewardError, match="'tiny-reward' raised ZeroDivisionError"):
        rewards(PROMPTS, COMPLETIONS, IDS, {})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: (make_model(), None), "does not say where it came from"),
        (lambda: (torch.nn.Linear(2, 1), make_tokenizer()), "Linear has no config"),
        (lambda: (make_model(), make_tokenizer()), "neither a pad nor an EOS"),
        (lambda: (make_model(), [None, None]), "got 2 for 1 functions"),
    ],
    ids=["no-tokenizer", "no-config", "no-pad", "too-many"],
)
def test_unusable_models_are_refused_at_load(make, sentence):
    model, tokenizer = make()
    with pytest.raises(ValueError, match=sentence):
        load_reward_functions(model, tokenizer)


@pytest.mark.parametrize(
    ("prompts", "completions", "sentence"),
    [
        (CHAT_PROMPTS, CHAT_COMPLETIONS, "no chat template"),
        (PROMPTS, CHAT_COMPLETIONS, "one format.*sample 0"),
        (["", "two"], ["", "one"], "without tokens: sample 0"),
    ],
    ids=["no-template", "mixed", "empty"],
)
def test_unreadable_samples_are_refused(prompts, completions, sentence):
    rewards = load_reward_functions(make_model(), make_tokenizer(pad_token="<pad>"))
    with pytest.raises(ValueError, match=sentence):
        rewards(prompts, completions, [[]] * len(prompts), {})


# --- builtins


def test_completion_text_reads_both_formats():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert completion_text("ab") == "ab"
    assert completion_text([{"role": "assistant", "content": "ab"}]) == "ab"
    assert completion_text([{"role": "assistant", "content": parts}]) == "ab"
    assert completion_text([{"role": "assistant", "content": None}]) == ""


def test_completion_text_refuses_other_types():
    with pytest.raises(ValueError, match="string or a list"):
        completion_text(3)


@pytest.mark.parametrize("chat", [False, True], ids=["standard", "conversational"])
def test_exact_match(chat):
    rewards = score("exact_match", {"answer": [" two\n", "3", None]}, chat=chat)
    assert_same(rewards, [[1.0], [0.0], [NAN]])


def test_exact_match_reads_numbers():
    assert exact_match(["72 ", "72.0"], [72, 72]) == [1.0, 0.0]


MATH = [
    (r"so \boxed{\frac{2}{6}}", r"\frac{1}{3}", 1.0),
    (r"so \boxed{\frac{1}{2}}", r"\frac{1}{3}", 0.0),
    ("The final answer is $72$.", "72", 1.0),
    ("no number", "72", 0.0),
    (r"\boxed{4}", "nothing to parse", None),
]


@pytest.mark.parametrize("column", ["solution", "answer"])
@pytest.mark.parametrize("timeout_s", [None, 60.0], ids=["main-thread", "worker-thread"])
def test_accuracy(column, timeout_s):
    pytest.importorskip("math_verify")
    completions, golds, expected = (list(x) for x in zip(*MATH, strict=True))
    rewards = load_reward_functions("accuracy", timeout_s=timeout_s)
    got = rewards(["?"] * 5, completions, [[]] * 5, {column: golds})[:, 0]
    assert_same(got, [NAN if e is None else e for e in expected])


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{-\dfrac{3}{4}}", "-0.75", 1.0),
        (r"\boxed{\{3, 1, 2\}}", r"\{1, 2, 3\}", 1.0),
        (r"\boxed{\{1, 2\}}", r"\{1, 2, 3\}", 0.0),
        (r"\boxed{10\text{ cm}}", "10", 1.0),
        (r"\boxed{10\,\mathrm{kg}}", "11", 0.0),
        (r"\boxed{1,234}", 1234, 1.0),
        (r"\boxed{1 + 2\sqrt{3}}", r"2\sqrt{3} + 1", 1.0),
        (r"\boxed{2}", r"2\sqrt{3} + 1", 0.0),
        (r"\boxed{(-\infty, 3]}", r"(-\infty, 3]", 1.0),
        (r"\boxed{3}", r"(-\infty, 3]", 0.0),
        (r"\boxed{50\%}", r"50\%", 1.0),
        (r"\boxed{50}", r"50\%", 1.0),
        (r"\boxed{7}", "With the (3 + 4) apples there are 7", 1.0),
        (r"\boxed{3}", r"so $x = \frac{6}{2}$", 1.0),
        (r"\boxed{x^2+2x+1}", "$(x+1)^2$", 1.0),
        (r"\boxed{72}", 72.0, 1.0),
        ("the answer is 72", 72, 0.0),
        (r"\boxed{}", 72, 0.0),
        (r"\boxed{7", 7, 0.0),
    ],
)
def test_accuracy_of_boxed_answers(answer, gold, expected):
    pytest.importorskip("math_verify")
    assert accuracy([answer], answer=[gold]) == [expected]


def test_accuracy_equals_trl():
    pytest.importorskip("math_verify")
    trl_rewards = pytest.importorskip("trl.rewards")
    completions, golds, _ = (list(x) for x in zip(*MATH, strict=True))
    chat = [[{"role": "assistant", "content": c}] for c in completions]
    assert accuracy(chat, solution=golds) == trl_rewards.accuracy_reward(chat, golds)


def test_accuracy_skips_samples_without_a_gold_and_logs_what_it_read():
    pytest.importorskip("math_verify")
    logged = {}
    assert accuracy(
        [r"\boxed{4}", r"\boxed{4}"], solution=[4, None], log_extra=logged.__setitem__
    ) == [1.0, None]
    assert logged == {"gold": ["4", ""], "parsed_answer": ["4", "4"]}


def test_accuracy_needs_a_gold_column():
    pytest.importorskip("math_verify")
    with pytest.raises(RewardError, match="`solution` or `answer`"):
        score("accuracy")


def test_accuracy_without_math_verify_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        accuracy(["4"], solution=["4"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a\nb</think>\n42", 1.0),
        ("\n<think></think>42\n", 1.0),
        ("<think>a</think> \n", 0.0),
        ("a <think>b</think>42", 0.0),
        ("<think>a 42", 0.0),
        ("a</think>42", 0.0),
        ("<think>a<think>b</think>42", 0.0),
        ("<think>a</think>b</think>42", 0.0),
        ("</think>42<think>", 0.0),
    ],
)
def test_format_think(text, expected):
    assert format_think([text, [{"role": "assistant", "content": text}]]) == [expected] * 2


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"<a>.*</a>", " <a>one\ntwo</a>\n", 1.0),
        (r"<a>.*</a>", "<a>one</a> two", 0.0),
        (r"Answer: \d+", "Answer: 42", 1.0),
        (r"Answer: \d+", "So. Answer: 42", 0.0),
        ("", "  ", 1.0),
    ],
)
def test_format(pattern, text, expected):
    chat = [{"role": "assistant", "content": text}]
    assert Format(pattern)([text, chat]) == [expected] * 2


def test_a_format_that_is_no_regular_expression_is_refused_at_load():
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        load_reward_functions("format", reward_kwargs={"format": {"pattern": "("}})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"target": 2}, [0.0, 0.0, -0.5, -1.0, -1.0]),
        ({"target": 2, "limit": 6}, [0.0, 0.0, -0.25, -0.5, -1.0]),
        ({"target": 0, "limit": 10}, [0.0, -0.2, -0.3, -0.4, -0.9]),
    ],
)
def test_length(given, expected):
    ids = [[5] * n for n in (0, 2, 3, 4, 9)]
    rewards = load_reward_functions("length", reward_kwargs={"length": given})
    assert rewards.names == ["length"]
    got = rewards(["p"] * 5, ["c"] * 5, ids, {})[:, 0]
    torch.testing.assert_close(got, torch.tensor(expected))
