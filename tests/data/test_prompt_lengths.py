"""max_prompt_length: which prompts are left out of which set, and what is said."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.data.prompt_lengths import drop_long_prompts
from rloo_fast.data.tokenize import RowTokenizer
from tests.support.tiny import CHAT_TEMPLATE, make_model, make_tokenizer

TEXTS = ["w1", "w1 w2", "w1 w2 w3", "w1 w2 w3 w4"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]  # two tokens more, the roles


def dropped(train, evaluation=None, limit: int | None = 2, **settings):
    args = RLOOConfig(
        "unused", max_prompt_length=limit, per_device_train_batch_size=2, use_cpu=True, **settings
    )
    tokenizer = RowTokenizer.from_config(make_tokenizer(chat_template=CHAT_TEMPLATE), None, args)
    return drop_long_prompts(
        train, evaluation, tokenizer, args.max_prompt_length, args.prompts_per_generation
    )


def dataset(prompts) -> Dataset:
    return Dataset.from_dict({"prompt": prompts, "number": [*range(len(prompts))]})


@pytest.mark.parametrize(("prompts", "limit"), [(TEXTS, 2), (CHATS, 4)], ids=["text", "chat"])
def test_longer_prompts_are_left_out_with_their_rows(prompts, limit, caplog):
    with caplog.at_level(logging.INFO, "rloo_fast"):
        train, evaluation = dropped(dataset(prompts), dataset(prompts[::-1]), limit)
    assert (train["number"][:], evaluation["number"][:]) == ([0, 1], [2, 3])
    assert f"train_dataset: 2 of 4 prompts have more than max_prompt_length={limit}" in caplog.text
    assert f"(the longest {limit + 2})" in caplog.text


def test_without_a_limit_or_a_long_prompt_a_set_stays_as_it_is():
    rows = dataset(TEXTS)
    assert dropped(rows, limit=None)[0] is rows
    assert dropped(rows, limit=4)[0] is rows


def test_every_set_of_several_is_filtered():
    _, sets = dropped(dataset(TEXTS), {"a": dataset(TEXTS[1:]), "b": dataset(TEXTS[:1])})
    assert {name: len(rows) for name, rows in sets.items()} == {"a": 1, "b": 1}


def test_a_stream_is_filtered_as_it_is_read():
    stream, _ = dropped(dataset(TEXTS).to_iterable_dataset(), max_steps=1)
    assert [row["number"] for row in stream] == [0, 1]


def test_nothing_left_is_an_error_with_the_longest():
    with pytest.raises(ValueError, match=r"max_prompt_length=1 tokens \(the longest 4\)"):
        dropped(dataset(TEXTS[1:]), limit=1)


def test_too_few_left_for_a_batch():
    with pytest.raises(ValueError, match="has 2 prompts, but a generation batch takes 4"):
        dropped(dataset(TEXTS), gradient_accumulation_steps=4)


def test_a_run_trains_on_the_rest(tmp_path):
    args = RLOOConfig(
        str(tmp_path), max_prompt_length=3, max_completion_length=8, use_cpu=True,
        per_device_train_batch_size=2, report_to="none",
    )  # fmt: skip
    rewards = [lambda completions, **_: [0.0] * len(completions)]
    tokenizer = make_tokenizer()
    trainer = RLOOTrainer(make_model(), rewards, args, dataset(TEXTS), processing_class=tokenizer)  # pyright: ignore
    assert trainer.train_dataset["prompt"][:] == TEXTS[:3]  # pyright: ignore
