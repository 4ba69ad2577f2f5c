"""What of tools, environments and the other arguments does not fit is said before a model loads."""

from __future__ import annotations

from unittest import mock

import pytest
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.sandbox import Sandbox
from tests.support.tool_chats import make_chat_model, make_chat_tokenizer
from tests.support.tool_functions import Counter, add
from tests.support.vision import make_processor, make_vision_model

USER = [{"role": "user", "content": "Count."}]
ROWS = [{"prompt": USER, "answer": str(i)} for i in range(8)]
AHEAD = {
    "max_staleness": 1,
    "use_vllm": True,
    "vllm_mode": "server",
    "vllm_server_base_url": "http://localhost:1",
}
LOADS = "rloo_fast.step.load.load_policy"
# templates that lose what tools need
NO_CALLS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
NO_TOOL_ROLE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}"
    "{% endif %}{{ m['content'] }}{% endfor %}"
)


class Plain:
    """An environment without a reward."""

    def reset(self, **row):
        self.row = row


def score(completions, **kwargs):
    return [0.0] * len(completions)


async def async_generator(a: int):
    """Something.

    Args:
        a: A number.
    """
    yield a


def undocumented(a: int) -> int:
    return a


def make(tmp_path, rows=ROWS, template=None, settings=None, model=None, **arguments):
    tokenizer = make_chat_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    config = RLOOConfig(
        str(tmp_path / "run"),
        **{"use_cpu": True, "report_to": "none", "per_device_train_batch_size": 4}
        | (settings or {}),
    )
    options = {"reward_funcs": score, "processing_class": tokenizer} | arguments
    return RLOOTrainer(
        model=model or make_chat_model(tokenizer),
        args=config,
        train_dataset=None if rows is None else Dataset.from_list(rows),
        **options,
    )


CASES = {
    "an async generator": ({"tools": [async_generator]}, "'async_generator' is a generator"),
    "no docstring": ({"tools": [undocumented]}, "'undocumented' has no schema"),
    "an unknown name": ({"tools": ["pyhton"]}, "'pyhton' is not a tool"),
    "model code": ({"tools": "python"}, "execute_model_code=True"),
    "a template without calls": (
        {"tools": [add], "template": NO_CALLS},
        "does not show the name of a call, arguments, argument's value",
    ),
    "a template that refuses tools": (
        {"tools": [add], "template": NO_TOOL_ROLE},
        "refuses a conversation with a tool call",
    ),
    "prompts that are texts": (
        {"tools": [add], "rows": [{"prompt": "Count."}] * 4},
        "train_dataset: with tools, prompts are conversations",
    ),
    "an unknown environment": (
        {"environment_factory": {"a": Counter}, "rows": [{"prompt": USER, "environment": "b"}] * 4},
        "environment='b'",
    ),
    "rows without an environment": (
        {"environment_factory": {"a": Counter}},
        "each row names its environment in the column 'environment'",
    ),
    "no reset": ({"environment_factory": object}, "no method `reset`"),
    "no reward": (
        {"environment_factory": Plain, "reward_funcs": None},
        "At least one reward function is needed",
    ),
    "nothing at all": ({"reward_funcs": None}, "At least one reward function is needed"),
    "no dataset and no length": ({"environment_factory": Counter, "rows": None}, "set max_steps"),
    "no dataset and several environments": (
        {"environment_factory": {"a": Counter}, "rows": None, "settings": {"max_steps": 2}},
        "`train_dataset` is required",
    ),
    "no dataset and no environment": (
        {"tools": [add], "rows": None},
        "`train_dataset` is required",
    ),
    "a column named environments": (
        {"environment_factory": Counter, "rows": [{"prompt": USER, "environments": 1}] * 4},
        "the column 'environments' has the name",
    ),
    "rewards in processes": (
        {"environment_factory": Counter, "settings": {"reward_processes": 1}},
        "reward_processes=1 is not offered with environment_factory",
    ),
    "no columns": (
        {"environment_factory": Counter, "settings": {"remove_unused_columns": True}},
        "remove_unused_columns=True leaves nothing",
    ),
    "tools and rollout_func": (
        {"tools": [add], "rollout_func": lambda prompts, trainer: {}},
        "pass it, or them",
    ),
    "tools in the trainer's thread": (
        {"tools": [add], "settings": {**AHEAD, "tool_threads": 0}},
        "tool_threads=0 with max_staleness=1 is refused",
    ),
    "rollout_func ahead": (
        {"rollout_func": lambda prompts, trainer: {}, "settings": AHEAD},
        "max_staleness=1 with rollout_func is refused",
    ),
    "limits without tools": (
        {"settings": {"tool_failure": "end", "tool_timeout_s": 3}},
        "tool_timeout_s and tool_failure has no effect without tools",
    ),
    "a weight too many": (
        {"environment_factory": Counter, "settings": {"reward_weights": [1.0, 2.0]}},
        r"reward weights \(2\) must match number of reward functions \(1\)",
    ),
}


@pytest.mark.parametrize(("given", "message"), CASES.values(), ids=CASES)
def test_it_is_said_before_a_model_is_loaded(given, message, tmp_path):
    with mock.patch(LOADS) as load, pytest.raises(ValueError, match=message):
        make(tmp_path, **given)
    assert not load.called


def test_with_a_processor_it_says_that_a_tokenizer_would_do(tmp_path):
    with pytest.raises(ValueError, match="the model's tokenizer is the processing_class, not its"):
        make(
            tmp_path,
            tools=[add],
            model=make_vision_model("llava"),
            processing_class=make_processor("llava"),
        )


@pytest.mark.parametrize(
    "given", [{"tools": [3]}, {"environment_factory": {"a": 3}}, {"rollout_func": 3}]
)
def test_what_is_of_another_type_is_a_type_error(given, tmp_path):
    with mock.patch(LOADS) as load, pytest.raises(TypeError):
        make(tmp_path, **given)
    assert not load.called


def test_the_prompt_shows_the_tools_and_a_template_that_hides_them_is_logged(tmp_path, caplog):
    model = make_chat_model(make_chat_tokenizer())
    trainer = make(tmp_path, model=model, tools=[add], environment_factory=Counter)
    (prompt,) = trainer.collector.tokenize([{"prompt": USER, "answer": "1"}])
    text = trainer.processing_class.decode(prompt.ids)
    assert '"name": "add"' in text
    assert '"name": "increase"' in text
    assert trainer.rewards.names == ["score", "Counter"]
    assert trainer.rewards.weights.tolist() == [1.0, 1.0]
    assert "does not show the tools" not in caplog.text
    call = (
        "{% for c in m['tool_calls'] or [] %}"
        "<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}"
    )
    make(tmp_path, model=model, tools=[add], template=NO_CALLS.replace("\n", call))
    assert "does not show the tools add" in caplog.text


def test_a_run_without_a_dataset_gets_its_prompts_from_the_environment(tmp_path):
    model = make_chat_model(make_chat_tokenizer())
    trainer = make(
        tmp_path, rows=None, model=model, reward_funcs=None, environment_factory=Counter,
        settings={"max_steps": 2},
    )  # fmt: skip
    assert len(trainer.train_dataset) == 2  # 4 completions, 2 of each prompt
    assert trainer.rewards.names == ["Counter"]


def test_the_sandbox_is_asked_for_where_programs_are_run(tmp_path):
    from rloo_fast.tools import python

    assert Sandbox  # it is not made before a program runs
    with (
        mock.patch("rloo_fast.tools.loading.unsuited", return_value="no Landlock"),
        mock.patch(LOADS) as load,
        pytest.raises(RuntimeError, match="no Landlock"),
    ):
        make(tmp_path, tools=[python])
    assert not load.called
