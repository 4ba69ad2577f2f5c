"""Rows that cannot be used: which step fails and what is saved, or how they are skipped."""

import logging

import pytest
from datasets import Dataset, IterableDataset

import rloo_fast.data.checks
from rloo_fast import RLOOConfig
from rloo_fast.data.loader import eval_loader, train_loader
from rloo_fast.data.row_errors import UnreadableRow
from rloo_fast.data.skipping import Skipping
from rloo_fast.data.tokenize import RowTokenizer
from tests.support.interrupted import names
from tests.support.kill_resume import make_trainer, metrics_of
from tests.support.tiny import CHAT_TEMPLATE, make_tokenizer

BAD = {
    "empty": {"prompt": "", "n": 1},
    "blank": {"prompt": "  ", "n": 1},
    "too long": {"prompt": "w1 " * 300, "n": 1},
    "no prompt": {"n": 1},
    "None": {"prompt": None, "n": 1},
    "a number": {"prompt": 7, "n": 1},
    "no column of the reward": {"prompt": "w1"},
    "a conversation among texts": {"prompt": [{"role": "user", "content": "w1"}], "n": 1},
    "no row": ["w1"],
}
SIZES = {"prompts_per_batch": 2, "micro_steps_per_batch": 1, "micro_steps_per_update": 1}


def rows(bad, at=(5,), count=14):
    for number in range(count):
        yield bad if number in at else {"prompt": f"w{number} w1", "n": number}


def stream(bad, at=(5,), count=14):
    return IterableDataset.from_generator(
        rows, gen_kwargs={"bad": bad, "at": tuple(at), "count": count}
    )


def by_n(completions, n, **_):
    return [len(text) + 0.1 * number for text, number in zip(completions, n, strict=True)]


def trainer_of(tmp_path, dataset, **settings):
    options = {"shuffle_dataset": False, "save_strategy": "no", "max_steps": 6, **settings}
    trainer = make_trainer(tmp_path, by_n, train_dataset=dataset, **options)
    trainer.processing_class.chat_template = CHAT_TEMPLATE
    return trainer


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_the_steps_before_a_row_that_cannot_be_used_are_saved(tmp_path, bad):
    trainer = trainer_of(tmp_path, stream(bad))
    with pytest.raises(ValueError, match=r"prompt|row") as caught:
        trainer.train()
    assert names(tmp_path) == ["checkpoint-2"]
    assert "checkpoint-2 holds the 2 steps done" in caught.value.__notes__[0]


@pytest.mark.parametrize("where", ["train", "eval"])
def test_the_steps_before_a_row_that_was_not_checked_are_saved(tmp_path, monkeypatch, where):
    monkeypatch.setattr(rloo_fast.data.checks, "NUM_CHECKED", 3)
    good = Dataset.from_list([{"prompt": f"w{n} w1", "n": n} for n in range(14)])
    bad = Dataset.from_list([*rows({"prompt": "", "n": 1})])
    trainer = trainer_of(
        tmp_path, bad if where == "train" else good, eval_strategy="steps", eval_steps=2
    )
    if where == "eval":
        trainer.eval_dataset = bad
    with pytest.raises(ValueError, match="a prompt is empty"):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("bad", [{"prompt": None, "n": 1}, {"n": 1}, {"prompt": "", "n": 1}])
def test_with_max_prompt_length_too(tmp_path, bad):
    trainer = trainer_of(
        tmp_path, stream(bad), skip_unusable_rows=True, max_prompt_length=2, max_steps=3
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert [log["rows_skipped"] for log in logs] == [0, 0, 1]


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_such_a_row_of_a_stream_is_skipped_and_counted(tmp_path, bad):
    trainer = trainer_of(tmp_path, stream(bad), skip_unusable_rows=True)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert [log["rows_skipped"] for log in logs] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("name", [n for n in BAD if n != "a conversation among texts"])
def test_the_first_row_may_be_one_that_is_skipped(tmp_path, name):
    trainer = trainer_of(tmp_path, stream(BAD[name], (0,)), skip_unusable_rows=True, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["rows_skipped"] == 1


def test_a_resumed_run_skips_as_the_one_that_was_not_interrupted(tmp_path):
    bad = {"prompt": "", "n": 1}
    whole = trainer_of(tmp_path / "whole", stream(bad, (1, 7)), skip_unusable_rows=True)
    whole.train()
    # stops at row 7, in the fourth step, as the option is not set; then goes on with it
    first = trainer_of(tmp_path / "cut", stream(bad, (7,)))
    with pytest.raises(ValueError, match=r"is empty.*skip_unusable_rows=True leaves such rows out"):
        first.train()
    second = trainer_of(tmp_path / "cut", stream(bad, (7,)), skip_unusable_rows=True)
    second.train(resume_from_checkpoint=True)
    trainer_of(tmp_path / "alone", stream(bad, (7,)), skip_unusable_rows=True).train()
    plain = [
        {k: v for k, v in row.items() if k != "rows_skipped"}
        for row in metrics_of(tmp_path / "alone")
    ]
    cut = [
        {k: v for k, v in row.items() if k != "rows_skipped"}
        for row in metrics_of(tmp_path / "cut")
    ]
    assert cut == plain
    assert [row["rows_skipped"] for row in metrics_of(tmp_path / "whole") if "reward" in row] == [
        1,
        1,
        1,
        2,
        2,
        2,
    ]


def test_a_broken_stream_ends_the_run_saved_even_when_rows_are_skipped(tmp_path):
    def breaks():
        yield from rows({}, (), 5)
        raise ConnectionError("the hub is down")

    trainer = trainer_of(tmp_path, IterableDataset.from_generator(breaks), skip_unusable_rows=True)
    with pytest.raises(ValueError, match="ConnectionError: the hub is down") as caught:
        trainer.train()
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert names(tmp_path) == ["checkpoint-2"]


def test_rows_of_a_dataset_and_of_its_evaluation_set_are_left_out(tmp_path, caplog):
    texts = ["w1", "", "w2", None, "w3", "w4 w4 w4 w4 w4 " * 60, "w5"]
    data = Dataset.from_dict({"prompt": texts, "n": [*range(7)]})
    seen = []

    def reward(completions, n, **_):
        seen.append(sorted({*n}))
        return [float(number) for number in n]

    with caplog.at_level(logging.WARNING, "rloo_fast"):
        trainer = make_trainer(
            tmp_path, reward, train_dataset=data, skip_unusable_rows=True, max_steps=2,
            save_strategy="no", eval_strategy="steps", eval_steps=2,
        )  # fmt: skip
    trainer.eval_dataset = data
    trainer.train()
    assert "train_dataset: 3 of 7 rows cannot be used and are left out. The first is row 1" in (
        caplog.text
    )
    assert sorted(n for step in seen[:2] for n in step) == [0, 2, 4, 6]  # an epoch
    assert sorted({n for call in seen[2:] for n in call}) == [0, 2, 4, 6]  # the evaluation
    logs = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert [log["eval_rows_skipped"] for log in logs] == [3]


def skipping(**settings):
    args = RLOOConfig("unused", use_cpu=True, **settings)
    return Skipping(RowTokenizer.from_config(make_tokenizer(), 600, args))


def test_the_order_of_the_rows_that_stay_is_that_of_all():
    texts = [f"w{i}" for i in range(20)]
    whole = Dataset.from_dict({"prompt": texts})
    with_bad = Dataset.from_dict({"prompt": [t if i % 5 else "" for i, t in enumerate(texts)]})

    def order(dataset, skip):
        loader = train_loader(dataset, **SIZES, shuffle=True, seed=3, skipping=skip)
        return [row["prompt"] for item in loader for row in item]

    kept = [text for text in order(whole, None) if int(text[1:]) % 5]
    assert order(with_bad, skipping()) == kept


def test_a_set_of_which_no_row_can_be_used_is_refused():
    with pytest.raises(ValueError, match=r"train_dataset: 2 of 2 rows cannot be used\. The first"):
        skipping().left_out(Dataset.from_dict({"prompt": ["", " "]}), "train_dataset")
    nothing = stream({"prompt": ""}, at=range(3), count=3)
    loader = train_loader(nothing, **SIZES, shuffle=False, seed=0, skipping=skipping())
    (item,) = next(iter(loader))
    assert "without a single row that can be used" in str(item)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_transform_that_fails_on_a_row_is_raised_in_its_step(num_workers):
    def transform(batch):
        if "w5" in batch["prompt"]:
            raise KeyError("w5")
        return batch

    data = Dataset.from_dict({"prompt": [f"w{i}" for i in range(8)]}).with_transform(transform)
    loader = train_loader(data, **SIZES, shuffle=False, seed=0, num_workers=num_workers)
    items = list(loader)
    assert [[type(row) for row in item] for item in items] == [
        [dict, dict], [dict, dict], [dict, UnreadableRow], [dict, dict],
    ]  # fmt: skip
    assert "KeyError: 'w5'" in str(items[2][1])
    kept = [
        r["prompt"] for i in eval_loader(data, prompts_per_batch=3, skipping=skipping()) for r in i
    ]
    assert kept == ["w0", "w1", "w2", "w3", "w4", "w6", "w7"]
