"""What contradicts max_staleness, or several servers, is refused before a model is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from rloo_fast import RLOOConfig
from rloo_fast.config.images import check_images_are_offered

SERVER = {"use_vllm": True, "vllm_mode": "server"}


def config(tmp_path: Any, **fields: Any) -> RLOOConfig:
    return RLOOConfig(str(tmp_path), use_cpu=True, report_to="none", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_staleness": 1, **SERVER},
        {"max_staleness": 4, **SERVER, "weight_sync_steps": 5, "queue_maxsize": 8},
        {"max_staleness": 1, "rollout_engine": "vllm_server"},
        {"max_staleness": 2, "rollout_engine": "engine.py:Mine"},
        {"max_staleness": 1, **SERVER, "gradient_accumulation_steps": 2},
        {**SERVER, "vllm_server_base_url": ["http://a:1", "http://b:1"]},
    ],
)
def test_what_goes_together(fields, tmp_path):
    config(tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_staleness": 1}, "Start `vllm serve` on other devices and set use_vllm=True"),
        ({"max_staleness": 1, "use_vllm": True}, "in the training processes they take turns"),
        ({"max_staleness": 1, "rollout_engine": "transformers"}, "leave max_staleness at 0"),
        ({"weight_sync_steps": 2}, "weight_sync_steps has no effect with max_staleness=0"),
        (
            {"queue_maxsize": 9, "max_inflight_tasks": 3},
            "max_inflight_tasks and queue_maxsize has no effect",
        ),
        ({"max_staleness": 2, **SERVER, "num_iterations": 2}, "Leave num_iterations at 1"),
        ({"max_staleness": 2, **SERVER, "weight_sync_steps": 4}, "set it to 3 or less"),
        ({"max_staleness": 1, **SERVER, "steps_per_generation": 8}, "a generation batch per"),
        ({"max_staleness": 1, **SERVER, "queue_maxsize": 4}, "must be at least 8, the completions"),
        ({"max_staleness": 1, **SERVER, "max_inflight_tasks": 1}, "must be at least 2"),
        ({"max_staleness": 1, **SERVER, "vllm_enable_sleep_mode": True}, "devices of their own"),
        ({"max_staleness": 1, **SERVER, "vllm_lora": "adapter"}, "leave it 'merged'"),
        (
            {**SERVER, "vllm_server_base_url": ["http://a:1", "http://a:1/"]},
            "names a server twice",
        ),
        ({**SERVER, "vllm_server_base_url": ["http://a:1", "b:1"]}, "is like http://"),
        (
            {
                **SERVER,
                "vllm_server_base_url": ["http://a:1", "http://b:1"],
                "vllm_enable_sleep_mode": True,
            },
            "several servers is refused",
        ),
    ],
)
def test_what_does_not(fields, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        config(tmp_path, per_device_train_batch_size=8, **fields)


@pytest.mark.parametrize("given", ["http://a:1", ["http://a:1"]])
def test_one_server_may_be_a_text_or_a_list(given, tmp_path):
    assert config(tmp_path, **SERVER, vllm_server_base_url=given).server_urls == ["http://a:1"]


def test_images_are_sampled_ahead_by_engines_that_read_them_themselves(tmp_path):
    args = config(tmp_path, max_staleness=1, rollout_engine="engine.py:Mine")
    takes = {"takes_images": True, "reads_images": False}
    with pytest.raises(ValueError, match=r"not offered with rollout_engine='engine\.py:Mine' yet"):
        check_images_are_offered(args, type("Mine", (), takes))
    check_images_are_offered(args, type("Mine", (), takes | {"reads_images": True}))
