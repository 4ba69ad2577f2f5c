"""Whole runs with tools, environments and rollout functions, over turns that a test writes."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.cli.quickstart_tools import build_tokenizer
from rloo_fast.records import Rollout
from rloo_fast.tools.calculator import calculator
from tests.support.tiny import InjectedEngine
from tests.support.tool_chats import make_chat_model
from tests.support.tool_functions import Counter, divide, wait

ROWS = [{"prompt": [{"role": "user", "content": f"{i}+1"}], "start": i} for i in range(8)]
CALL = '<tool_call>{{"name": "{}", "arguments": {}}}</tool_call>'


def call(name: str, **arguments: Any) -> str:
    return CALL.format(name, json.dumps(arguments))


class Scripted(InjectedEngine):
    """Says `script(place in the group, turn, what was said so far)` in each turn."""

    def __init__(self, tokenizer, script):
        super().__init__()
        self.tokenizer, self.script = tokenizer, script

    def _generate(self, prompt_ids, sampling, seeds, on_finished):
        ids = []
        for i, prompt in enumerate(prompt_ids):
            said = self.tokenizer.decode(prompt)
            text = self.script(i % 4, said.count("<|assistant|>") - 1, said)
            ids.append(self.tokenizer(text)["input_ids"][: sampling.max_new_tokens])
        ends = {self.tokenizer.eos_token_id}
        return Rollout(ids, ["stop" if row[-1] in ends else "length" for row in ids])


END = "<|endoftext|>"


def add_up(place, turn, said):
    """Two calls and an answer; the last of a group answers at once."""
    if turn:  # not all are sampled together any more
        place = int(said.split('"by": ')[1][0]) - 1
    if place == 3 or turn == 2:
        return f"{place}" + END
    return call("increase", by=place + 1) + END


def score(completions, **kwargs):
    return [float(len(messages)) for messages in completions]


def make(tmp_path, script=None, *, rows=ROWS, settings=None, **arguments):
    tokenizer = build_tokenizer()
    config = RLOOConfig(
        str(tmp_path / "run"),
        **{
            "use_cpu": True, "report_to": "none", "disable_tqdm": True, "num_generations": 4,
            "per_device_train_batch_size": 8, "max_completion_length": 400, "max_steps": 2,
            "logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False,
            "learning_rate": 0.1, "optim": "sgd", "beta": 0.0,
        } | (settings or {}),
    )  # fmt: skip
    options = {"reward_funcs": score} | arguments
    trainer = RLOOTrainer(
        model=make_chat_model(tokenizer),
        args=config,
        train_dataset=None if rows is None else Dataset.from_list(rows),
        processing_class=tokenizer,
        **options,
    )
    if script is not None:
        trainer.rollouts.engine = Scripted(tokenizer, script)
    return trainer


def logs(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def test_an_environment_gives_prompts_tools_and_reward(tmp_path):
    seen = []

    def look(prompts, completions, environments, **kwargs):
        seen.append((prompts, completions, [e.count for e in environments]))
        return [0.0] * len(prompts)

    trainer = make(tmp_path, add_up, reward_funcs=look, environment_factory=Counter)
    trainer.train()
    (prompts, completions, counts), _ = seen
    start = [int(prompt[-1]["content"].split()[-1].rstrip(".")) for prompt in prompts]
    assert [c - s for c, s in zip(counts, start, strict=True)] == [2, 4, 6, 0] * 2
    roles = [[message["role"] for message in messages] for messages in completions[:4]]
    turns = ["assistant", "tool", "assistant", "tool", "assistant"]
    assert roles == [turns, turns, turns, ["assistant"]]
    assert completions[0][1] == {
        "role": "tool", "name": "increase", "content": str(start[0] + 1),
    }  # fmt: skip
    for row in logs(trainer):
        assert row["rewards/Counter/mean"] == pytest.approx(row["reward"])
        assert row["tools/call_frequency"] == 6 / 4
        assert row["tools/failure_frequency"] == 0
        assert row["tools/turns"] == 10 / 4


def test_the_environment_alone_is_enough(tmp_path):
    trainer = make(
        tmp_path, add_up, rows=None, reward_funcs=None, environment_factory=Counter
    )  # fmt: skip
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    assert [row["reward"] for row in logs(trainer)] == [3.0, 3.0]  # 2, 4, 6 and 0
    assert not torch.equal(before, trainer.model.lm_head.weight)


def test_rewards_of_turns_are_summed(tmp_path):
    def per_turn(completions, **kwargs):
        return [
            [float(t) for t, m in enumerate(messages) if m["role"] == "assistant"]
            for messages in completions
        ]

    trainer = make(tmp_path, add_up, reward_funcs=per_turn, environment_factory=Counter)
    trainer.train()
    assert logs(trainer)[0]["rewards/per_turn/mean"] == 3 * (0 + 2 + 4) / 4


def test_a_list_of_another_length_is_refused(tmp_path):
    def wrong(completions, **kwargs):
        return [[1.0, 2.0]] * len(completions)

    trainer = make(tmp_path, add_up, reward_funcs=wrong, environment_factory=Counter)
    with pytest.raises(ValueError, match="a list of 2 rewards, one for each turn, but the model"):
        trainer.train()


def test_tools_that_hang_do_not_hang_the_run(tmp_path):
    def hang(place, turn, said):
        return (call("wait", seconds=30) if turn == 0 and place < 2 else "done") + END

    start = time.monotonic()
    trainer = make(tmp_path, hang, tools=[wait], settings={"tool_timeout_s": 0.3, "max_steps": 1})
    trainer.train()
    assert time.monotonic() - start < 20
    (row,) = logs(trainer)
    assert row["tools/failure_frequency"] == 1
    assert row["tools/threads_left_behind"] == 4


@pytest.mark.parametrize(("failure", "turns"), [("answer", 2.0), ("end", 1.0)])
def test_a_tool_that_raises_answers_or_ends_the_trajectory(failure, turns, tmp_path):
    def divide_by_nothing(place, turn, said):
        return (call("divide", a=place, b=0) if turn == 0 else "no number") + END

    seen = []

    def look(completions, **kwargs):
        seen.extend(completions)
        return [float(len(str(m))) for m in completions]

    settings = {"tool_failure": failure, "max_steps": 1}
    trainer = make(
        tmp_path, divide_by_nothing, tools=[divide], reward_funcs=look, settings=settings
    )
    trainer.train()
    (row,) = logs(trainer)
    assert row["tools/turns"] == turns
    assert row["tools/failure_frequency"] == 1
    assert row["tools/ended_by_failure"] == (failure == "end")
    assert seen[0][1]["content"] == "{'error': 'division by zero'}"


def test_groups_without_signal_are_replaced_by_others(tmp_path):
    drawn = []

    def sometimes(place, turn, said):
        if turn == 0:
            drawn.append(place)
            return call("calculator", expression=f"{place}*2") + END
        return said.rsplit("<|tool|>", 1)[1].split(END)[0] + END

    def even_groups_alike(prompts, completions, **kwargs):
        number = [int(prompt[-1]["content"].split("+")[0]) for prompt in prompts]
        answers = [float(messages[-1]["content"]) for messages in completions]
        return [0.0 if n % 2 else a for n, a in zip(number, answers, strict=True)]

    trainer = make(
        tmp_path, sometimes, tools=[calculator], reward_funcs=even_groups_alike,
        settings={"dynamic_sampling": True},
    )  # fmt: skip
    trainer.train()
    assert len(drawn) > 16
    assert [row["tools/call_frequency"] for row in logs(trainer)] == [1.0, 1.0]


def test_a_rollout_func_makes_the_completions(tmp_path):
    asked, seen = [], []

    def rollout(prompts, trainer):
        asked.append((len(prompts), type(trainer).__name__))
        ids = trainer.processing_class.apply_chat_template(prompts, add_generation_prompt=True)
        ids = ids["input_ids"]
        drawn = trainer.rollouts.generate(ids, trainer.collector.sampling, [*range(len(ids))])
        foreign = trainer.processing_class("7")["input_ids"]
        return {
            "prompt_ids": ids,
            "completion_ids": [[*row, *foreign] for row in drawn.completion_ids],
            "logprobs": [[*row, 0.0] for row in drawn.logps],
            "env_mask": [[1] * len(row) + [0] for row in drawn.completion_ids],
            "length": [len(row) for row in drawn.completion_ids],
        }

    def look(completions, completion_ids, length, **kwargs):
        seen.append((completions, length))
        assert all(len(ids) == n + 1 for ids, n in zip(completion_ids, length, strict=True))
        return [float(sum(ids) % 5) for ids in completion_ids]

    trainer = make(
        tmp_path, rollout_func=rollout, reward_funcs=look,
        settings={"max_completion_length": 6, "beta": 0.1, "eval_strategy": "no"},
    )  # fmt: skip
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    assert asked == [(8, "RLOOTrainer")] * 2
    assert all(m[-1]["content"].endswith("7") for m in seen[0][0])
    first = logs(trainer)[0]
    assert first["completions/mean_length"] == sum(seen[0][1]) / 8  # of what was sampled
    assert first["sampling/logp_diff_max"] < 1e-3
    assert not torch.equal(before, trainer.model.lm_head.weight)


@pytest.mark.parametrize("masked", [True, False])
def test_prompts_without_signal_are_replaced_in_what_a_rollout_func_makes(masked, tmp_path):
    asked, trained = [], []

    def rollout(prompts, trainer):
        asked.append(len(prompts))
        ids = trainer.processing_class.apply_chat_template(prompts, add_generation_prompt=True)
        ids = ids["input_ids"]
        drawn = trainer.rollouts.generate(ids, trainer.collector.sampling, [*range(len(ids))])
        found = {
            "prompt_ids": ids,
            "completion_ids": drawn.completion_ids,
            "logprobs": drawn.logps,
        }
        mask = [[1] * len(row) for row in drawn.completion_ids]
        return found | ({"env_mask": mask} if masked else {})

    def every_second(completions, start, **kwargs):
        return [float(row % 4 * (n % 2)) for row, n in enumerate(start)]

    trainer = make(
        tmp_path, rollout_func=rollout, reward_funcs=every_second,
        settings={
            "max_completion_length": 6, "eval_strategy": "no", "dynamic_sampling": True,
            "beta": 0.0, "max_steps": 2,
        },
    )  # fmt: skip
    collect = trainer.source.next

    def noting(*args):
        collected = collect(*args)
        trained.append(collected.batch)
        return collected

    trainer.source.next = noting
    trainer.train()
    assert [batch.num_rows for batch in trained] == [8, 8]
    assert all(set(batch.rows.reward.tolist()) == {0.0, 1.0, 2.0, 3.0} for batch in trained)
    assert sum(asked) > 16
    assert logs(trainer)[0]["dynamic/acceptance"] < 1
