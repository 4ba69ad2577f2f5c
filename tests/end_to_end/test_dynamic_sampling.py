"""Runs with dynamic sampling: the plain run where every group teaches, the same on one process and
two, and what ends them. Killed ones: test_train_resume.py."""

import json

import datasets
import pytest
import torch

from tests.support.kill_resume import ROWS, make_trainer, metrics_of
from tests.support.launch import run_worker_processes

LATER = ("dynamic/",)


def alternating(completions, **_):
    """Of two completions of a prompt one is right."""
    return [float(i % 2) for i in range(len(completions))]


def all_right(completions, **_):
    return [1.0] * len(completions)


def length(completions, **_):
    return [float(len(text) % 2) for text in completions]


def weights_of(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_where_every_group_has_signal_the_run_is_the_plain_one(tmp_path):
    """Bit for bit, over epochs, with evaluations, and with rows read by other processes."""
    common = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 12, "save_steps": 100}
    runs = []
    for name, settings in {
        "plain": {},
        "dynamic": {"dynamic_sampling": True, "dataloader_num_workers": 1},
    }.items():
        trainer = make_trainer(tmp_path / name, alternating, **common, **settings)
        trainer.train()
        logs = [
            {k: v for k, v in row.items() if not k.startswith(LATER)}
            for row in metrics_of(tmp_path / name)
        ]
        runs.append((weights_of(trainer), logs))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1] == runs[1][1]


def test_a_reward_without_signal_trains_nothing_and_says_so(tmp_path, caplog):
    trainer = make_trainer(
        tmp_path, all_right, dynamic_sampling=True, max_sampling_rounds=2, beta=0.0, max_steps=2
    )
    before = weights_of(trainer)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(trainer), strict=True))
    assert caplog.text.count("0 of 2 groups that have signal: max_sampling_rounds=2") == 2
    assert [row["dynamic/without_signal"] for row in metrics_of(tmp_path)[:2]] == [2, 2]


def test_a_curriculum_alone_takes_every_group_once(tmp_path):
    trainer = make_trainer(tmp_path, all_right, curriculum=0.25, max_steps=14, beta=0.0)
    trainer.train()
    logs = metrics_of(tmp_path)[:14]
    assert [row["dynamic/generated_per_used"] for row in logs] == [1] * 14
    assert {row["dynamic/acceptance"] for row in logs} == {0}  # all are right
    epochs = [row["dynamic/prompt_epoch"] for row in logs]
    assert epochs[9] == 0  # 20 rows, two of a batch
    assert 1 <= epochs[-1] <= 5  # of later ones about a quarter comes


def test_a_filter_that_fails_ends_the_run_saved(tmp_path):
    (tmp_path / "mine.py").write_text(
        "seen = []\n"
        "def keep(group):\n"
        "    seen.append(group)\n"
        "    if len(seen) > 8:\n"
        "        raise KeyError('hardness')\n"
        "    return True\n"
    )
    trainer = make_trainer(
        tmp_path / "out",
        alternating,
        dynamic_sampling=True,
        rollout_filter=f"{tmp_path / 'mine.py'}:keep",
        save_steps=100,
    )
    with pytest.raises(ValueError, match=r"on the group of prompt .* KeyError") as caught:
        trainer.train()
    assert any("checkpoint-4 holds the 4 steps done" in note for note in caught.value.__notes__)


def test_a_stream_that_cannot_begin_again_ends_the_run_saved(tmp_path):
    """It is endless otherwise: after its last row comes the first of another pass."""
    is_over = []

    def rows():
        yield from [] if is_over else ROWS[:6]

    def reward(completions, **_):
        is_over.append(True)
        return alternating(completions)

    trainer = make_trainer(
        tmp_path, reward, dynamic_sampling=True, shuffle_dataset=False, max_steps=9, save_steps=100,
        train_dataset=datasets.IterableDataset.from_generator(rows),
    )  # fmt: skip
    with pytest.raises(ValueError, match="stream ended without a row that can be used") as caught:
        trainer.train()
    assert any("checkpoint-3 holds the 3 steps done" in note for note in caught.value.__notes__)


def test_a_checkpoint_is_resumed_with_the_options_it_was_saved_with(tmp_path):
    make_trainer(tmp_path, alternating, dynamic_sampling=True, max_steps=3).train()
    plain = make_trainer(tmp_path, alternating, max_steps=6)
    with pytest.raises(ValueError, match="with dynamic_sampling or curriculum, this one has none"):
        plain.train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_take_the_prompts_that_one_takes(tmp_path):
    """K = 3: completions of a round do not divide evenly; K = 4: groups are split over them."""
    cases = json.dumps({"whole groups": [3, 12], "split groups": [4, 12]})
    for processes in (1, 2):
        done = run_worker_processes("dynamic_worker", str(tmp_path), cases, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    for name, found in one.items():
        assert found["trained"] == two[name]["trained"]
        assert found["fates"] == two[name]["fates"]
        assert 3 in found["fates"]
        assert found["metrics"] == [pytest.approx(row) for row in two[name]["metrics"]]
        assert found["weights"] == pytest.approx(two[name]["weights"], rel=1e-6)
        assert found["resumed"] == two[name]["resumed"] == [True] * 3
