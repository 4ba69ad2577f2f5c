"""Whatever a reward function does to what it is given stays with that call."""

import threading
from datetime import date

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.judges.compare import compare
from rloo_fast.rewards import load_reward_functions
from rloo_fast.rewards.copies import fresh
from tests.support.kill_resume import make_trainer, metrics_of
from tests.support.tiny import CHAT_TEMPLATE, make_model, make_tokenizer

ROWS = [
    {"prompt": [{"role": "user", "content": f"w{i}"}], "tests": [i, 100 + i], "meta": {"n": [i]}}
    for i in range(8)
]


def spoil(prompts, completions, completion_ids, tests, meta, log_extra=None, **kwargs):
    """1 for a row that is as the dataset and the sampler made it; then ruins all of them."""
    fair = [
        float(len(p) == 1 and len(c) == 1 and len(t) == 2 and len(m["n"]) == 1 and len(ids) > 0)
        for p, c, t, m, ids in zip(prompts, completions, tests, meta, completion_ids, strict=True)
    ]
    logged = [[number] for number in fair]
    if log_extra is not None:
        log_extra("seen", logged)
    for each in (*prompts, *completions, *tests, *completion_ids, *logged):
        each.clear()
    for m in meta:
        m["n"].append("more")
    for each in (prompts, completions, completion_ids, tests, meta):
        each.clear()
    return fair


async def spoil_async(**kwargs):
    return spoil(**kwargs | {"log_extra": None})


def spoil_again(**kwargs):
    return spoil(**kwargs | {"log_extra": None})


def spoil_as_generator(**kwargs):
    yield from spoil(**kwargs | {"log_extra": None})


def train(tmp_path, rewards, **settings):
    args = RLOOConfig(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=4, max_steps=2, logging_steps=1, report_to=[], save_strategy="no",
        disable_tqdm=True, eval_strategy="steps", eval_steps=2, log_completions_csv=True,
        learning_rate=1e-2, **settings,
    )  # fmt: skip
    trainer = RLOOTrainer(
        make_model(), rewards, args, Dataset.from_list(ROWS), Dataset.from_list(ROWS[:2]),
        processing_class=make_tokenizer(chat_template=CHAT_TEMPLATE),
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "options",
    [{}, {"overlap_rewards": True}, {"reward_timeout_s": 60.0}, {"reward_processes": 1}],
    ids=str,
)
def test_rows_functions_and_the_trainer_share_nothing_that_can_change(tmp_path, options):
    trainer = train(tmp_path, [spoil, spoil_async, spoil_again, spoil_as_generator], **options)
    means = {
        key: value
        for row in trainer.state.log_history
        for key, value in row.items()
        if key.startswith(("rewards/spoil", "eval_rewards/spoil")) and key.endswith("/mean")
    }
    assert means
    assert set(means.values()) == {1.0}
    written = (tmp_path / "completions.csv").read_text()
    assert "user: w" in written
    assert "[1.0]" in written
    assert "[]" not in written


def test_a_callback_s_changes_to_a_log_are_not_written(tmp_path):
    class Reshapes(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logs["mine"] = 3.0
            logs.pop("reward", None)
            logs["loss"] = f"{logs.get('loss', 0):.3f}"

    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="no")
    trainer.add_callback(Reshapes())
    trainer.train()
    row = metrics_of(tmp_path)[0]
    assert (row["mine"], isinstance(row["loss"], float), "reward" in row) == (3.0, True, True)


def test_a_callback_may_empty_its_log(tmp_path):
    class Empties(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logs.clear()

    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="no")
    trainer.add_callback(Empties())
    output = trainer.train()
    assert output.training_loss == output.metrics["train_loss"]
    assert "reward" in metrics_of(tmp_path)[0]


def test_a_reward_model_s_subclass_may_change_what_it_reads(tmp_path):
    from rloo_fast.rewards import RewardModel
    from tests.support.rewards import make_model as make_reward_model
    from tests.support.rewards import make_tokenizer as make_reward_tokenizer

    class Greedy(RewardModel):
        def __call__(self, prompts, completions, completion_ids=None):
            values = super().__call__(prompts, completions, completion_ids)
            prompts.clear()
            completions.clear()
            return values

    rewards = load_reward_functions(
        [
            Greedy(make_reward_model(), make_reward_tokenizer(eos_token="</s>")),
            lambda prompts, **_: [1.0, 1.0],
        ]
    )
    got = rewards(["a", "b"], ["c", "d"], [[1], [2]], {})
    assert got.shape == (2, 2)
    assert got[:, 1].tolist() == [1, 1]


def test_a_judge_may_change_what_it_reads():
    prompts = [[{"role": "user", "content": "w0"}], [{"role": "user", "content": "w1"}]]

    def judge(prompts, pairs):
        verdicts = [len(prompt) - 1 for prompt in prompts]
        for prompt in prompts:
            prompt.append("more")
        pairs.clear()
        return verdicts

    both = compare(judge, prompts, ["a", "b"], ["c", "d"], both_orders=True)
    assert [[j.verdict.index for j in two] for two in both] == [[0, 0], [0, 0]]
    assert [len(prompt) for prompt in prompts] == [1, 1]


@pytest.mark.parametrize(
    "value",
    [
        [1, [2, {"a": [3]}]], {"a": {"b": []}}, ({"a": 1},), {1, 2}, np.arange(3), torch.arange(3),
        bytearray(b"x"), [date(2024, 1, 2), None, 1.5, b"y"],
    ],
    ids=repr,
)  # fmt: skip
def test_a_copy_is_equal_and_shares_no_container(value):
    copy = fresh(value)
    assert copy is not value
    assert type(copy) is type(value)
    assert str(copy) == str(value)
    stack = [(value, copy)]
    while stack:
        one, other = stack.pop()
        if isinstance(one, list | dict):
            assert one is not other
            items = zip(one, other, strict=True) if isinstance(one, list) else []
            stack += [*items, *((one[k], other[k]) for k in (one if isinstance(one, dict) else ()))]


def test_what_cannot_be_copied_is_passed_as_it_is():
    lock = threading.Lock()
    assert fresh([lock])[0] is lock
