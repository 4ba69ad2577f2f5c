"""What a rollout_func returns -> rows, a rollout, and columns for rewards; or what is wrong."""

from __future__ import annotations

import pytest
import torch

from rloo_fast.records import Prompt
from rloo_fast.step.rollout_func import call_rollout_func

ROWS = [Prompt("a", [1], {"answer": 1}), Prompt([{"role": "user", "content": "b"}], [2], {})]
GOOD = {
    "prompt_ids": [[1, 2], [3]],
    "completion_ids": [[4, 5, 9], [6]],
    "logprobs": [[-0.1, 0.0, -0.3], [-0.4]],
}


def made(rows=ROWS, **changes):
    output = {**GOOD, **changes}
    output = {key: value for key, value in output.items() if value != "left out"}
    return call_rollout_func(
        lambda prompts: output,
        rows,
        decode=lambda ids: " ".join(map(str, ids)),
        ends={9},
        num_ids=10,
    )


def test_completions_of_sampled_tokens_alone():
    rows, rollout = made()
    assert [row.ids for row in rows] == [[1, 2], [3]]
    assert rollout.completion_ids == [[4, 5, 9], [6]]
    assert rollout.finish_reasons == ["stop", "length"]
    assert rollout.logps == GOOD["logprobs"]
    assert rollout.trajectories is None
    assert [row.columns for row in rows] == [{"answer": 1}, {}]


def test_with_a_mask_only_what_was_sampled_counts():
    _, rollout = made(env_mask=[[1, 0, 1], [1]])
    first, second = rollout.trajectories
    assert first.strands[0] == ([1, 2, 4, 5, 9], [2, 4])
    assert first.messages == "4 5 9"
    assert second.messages == [{"role": "assistant", "content": "6"}]
    assert rollout.logps == [[-0.1, -0.3], [-0.4]]
    assert rollout.num_sampled == [2, 1]


def test_what_else_it_returns_are_columns():
    rows, _ = made(game=["x", "y"], version=3)
    assert [row.columns for row in rows] == [
        {"answer": 1, "game": "x", "version": 3},
        {"game": "y", "version": 3},
    ]


def test_tensors_and_no_log_probs():
    rows, rollout = made(prompt_ids=[torch.tensor([1, 2]), torch.tensor([3])], logprobs=None)
    assert rows[0].ids == [1, 2]
    assert rollout.logps is None


def test_prompts_are_copies():
    def spoil(prompts):
        prompts[1][0]["content"] = "spoilt"
        return GOOD

    call_rollout_func(spoil, ROWS, decode=str, ends=set(), num_ids=None)
    assert ROWS[1].text[0]["content"] == "b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": "left out"}, "must return logprobs in its dict"),
        ({"completion_ids": [[4]]}, "given 2 prompts, one for each completion, and returned 1"),
        ({"completion_ids": [["a"], [6]]}, r"completion_ids\[0\] must be token ids"),
        ({"completion_ids": 3}, "completion_ids must be a list"),
        ({"completion_ids": [[4, 5, 10], [6]]}, r"completion_ids\[0\] has 10, .* from 0 to 9"),
        ({"prompt_ids": [[1, 2], [-1]]}, r"prompt_ids\[1\] has -1, which is no token"),
        ({"prompt_ids": [[], [3]]}, r"prompt_ids\[0\] is empty"),
        ({"logprobs": [[-0.1], [-0.4]]}, "logprobs must have one value for every token"),
        ({"logprobs": [[None] * 3, [0.0]]}, r"logprobs\[0\] must be numbers"),
        ({"env_mask": [[1], [1]]}, "env_mask must have one value for every token"),
        ({"game": ["x"]}, "returned 1 values of 'game'"),
        ({"prompts": ["x", "y"]}, "returned prompts, which reward functions get"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    with pytest.raises(ValueError, match=message):
        made(**changes)


def test_something_else_than_a_dict():
    with pytest.raises(ValueError, match="must return a dict"):
        call_rollout_func(lambda prompts: None, ROWS, decode=str, ends=set(), num_ids=None)
