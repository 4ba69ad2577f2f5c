"""Datasets whose columns are made when a row is read."""

import pytest
from datasets import Dataset, IterableDataset

from rloo_fast.data.first_rows import columns_of, rows_of
from tests.support.kill_resume import make_trainer

QUESTIONS = Dataset.from_dict({"question": [f"w{i}" for i in range(8)]})


def with_prompt(batch):
    return {"prompt": [f"{q} w1" for q in batch["question"]], "gold": batch["question"]}


def by_gold(completions, gold=None, **_):
    gold = gold or [""] * len(completions)  # the evaluation set has none
    return [float(word in text) for text, word in zip(completions, gold, strict=True)]


@pytest.mark.parametrize("limit", [None, 2])
def test_a_run_on_prompts_and_columns_that_a_transform_makes(tmp_path, limit):
    lazy = QUESTIONS.with_transform(with_prompt)
    trainer = make_trainer(
        tmp_path, by_gold, train_dataset=lazy, max_steps=1, save_strategy="no",
        max_prompt_length=limit, max_completion_length=3,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1


def test_columns_are_those_of_a_row():
    assert columns_of(QUESTIONS, "d") == ["question"]
    assert columns_of(QUESTIONS.with_transform(with_prompt), "d") == ["prompt", "gold"]
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "w0", "n": 1}]))
    assert columns_of(stream, "d") == ["prompt", "n"]
    assert columns_of(stream.map(lambda row: {"m": 2}), "d") == ["prompt", "n", "m"]


def test_rows_of_a_transform():
    rows = rows_of(QUESTIONS.with_transform(with_prompt), 2, 4, ["prompt"])
    assert [row["prompt"] for row in rows] == ["w2 w1", "w3 w1"]


def test_rows_of_some_columns():
    data = Dataset.from_dict({"prompt": ["w0", "w1", "w2"], "n": [1, 2, 3]})
    assert rows_of(data, 1, 9, ["prompt", "image"]) == [{"prompt": "w1"}, {"prompt": "w2"}]


def test_a_transform_without_a_prompt_is_refused(tmp_path):
    lazy = QUESTIONS.with_transform(lambda batch: {"text": batch["question"]})
    with pytest.raises(ValueError, match=r"no column 'prompt', only \['text'\]. Its transform"):
        make_trainer(tmp_path, train_dataset=lazy)


def test_a_column_that_the_transform_drops_is_missed_before_a_model_is_loaded(tmp_path):
    data = QUESTIONS.add_column("gold", ["w1"] * 8)
    lazy = data.with_transform(lambda batch: {"prompt": batch["question"]})

    def needs_gold(completions, gold, **_):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"train_dataset: .* needs `gold`, but the dataset has no"):
        make_trainer(tmp_path, needs_gold, train_dataset=lazy)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_format_without_dicts_is_refused(tmp_path, streamed):
    data = QUESTIONS.rename_column("question", "prompt")
    data = (data.to_iterable_dataset() if streamed else data).with_format("pandas")
    with pytest.raises(ValueError, match=r"call dataset\.with_format\(None\)"):
        make_trainer(tmp_path, train_dataset=data)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_formats_that_leave_text_alone(tmp_path, kind):
    data = Dataset.from_dict({"prompt": ["w0", "w1", "w2"], "n": [1, 2, 3]}).with_format(kind)
    seen = []

    def reward(completions, n, **_):
        seen.extend(int(number) for number in n)
        return [float(number) for number in n]

    trainer = make_trainer(tmp_path, reward, train_dataset=data, max_steps=1, save_strategy="no")
    trainer.train()
    assert seen
    assert {*seen} <= {1, 2, 3}
