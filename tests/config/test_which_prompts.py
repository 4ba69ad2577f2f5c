"""Options that choose prompts and groups: what contradicts each other is refused, with what to
write."""

import pytest
from datasets import Dataset

from rloo_fast import RLOOConfig
from rloo_fast.data.checks import check_datasets
from tests.support import kill_resume

FILTER = f"{kill_resume.__name__}:is_not_tiny"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rollout_filter": FILTER}, "says which groups are replaced.*set dynamic_sampling=True"),
        ({"max_sampling_rounds": 3}, "no effect without dynamic_sampling=True"),
        ({"soft_punish_cache": 513}, r"\(513\) is the last part of max_completion_length \(512\)"),
        ({"dynamic_sampling": True, "rollout_filter": "keep"}, "must be 'package.module:function'"),
        ({"dynamic_sampling": True, "rollout_filter": max}, "finds it by its name"),
        ({"dynamic_sampling": True, "rollout_filter": "math:keep"}, "has no function 'keep'"),
        ({"dynamic_sampling": True, "rollout_filter": "math:pi"}, "has no function 'pi'"),
        ({"dynamic_sampling": True, "rollout_filter": "no.such:x"}, "could not be loaded: Module"),
        ({"dynamic_sampling": True, "num_generations": 1}, "at least 2 generations per prompt"),
    ],
)
def test_what_is_refused(options, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        RLOOConfig(str(tmp_path), **options)


def test_what_is_taken(tmp_path):
    options = {
        "dynamic_sampling": True, "rollout_filter": FILTER, "max_sampling_rounds": 3,
        "curriculum": 1.0, "soft_punish_cache": 512,
    }  # fmt: skip
    config = RLOOConfig(str(tmp_path), **options)
    again = RLOOConfig(**config.to_dict())
    assert {name: getattr(again, name) for name in options} == options


def test_a_curriculum_of_a_stream_is_refused(tmp_path):
    stream = Dataset.from_list(kill_resume.ROWS).to_iterable_dataset()
    args = RLOOConfig(str(tmp_path), curriculum=0.5, max_steps=2)
    with pytest.raises(
        ValueError, match=r"curriculum=0.5 remembers every row .* without streaming"
    ):
        check_datasets(stream, None, args)
