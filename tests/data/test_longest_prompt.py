"""The longest prompt of a run: what the rollout engine's memory is laid out for."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset

from rloo_fast import RLOOConfig
from rloo_fast.data.longest_prompt import OF_A_STREAM, longest_prompt
from rloo_fast.data.row_errors import UnusableRow
from rloo_fast.data.tokenize import RowTokenizer
from tests.support.tiny import CHAT_TEMPLATE, make_tokenizer

TEXTS = ["w1", "w1 w2 w3 w4", "w1 w2"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]  # two tokens more, the roles


def tokenizer() -> RowTokenizer:
    args = RLOOConfig("unused", use_cpu=True)
    return RowTokenizer.from_config(make_tokenizer(chat_template=CHAT_TEMPLATE), None, args)


def dataset(prompts) -> Dataset:
    return Dataset.from_dict({"prompt": prompts})


@pytest.mark.parametrize(("prompts", "longest"), [(TEXTS, 4), (CHATS, 6)], ids=["text", "chat"])
def test_every_prompt_counts_with_its_chat_template(prompts, longest):
    assert longest_prompt(dataset(prompts), None, tokenizer(), None) == longest


def test_prompts_behind_the_first_thousands_count():
    prompts = ["w1"] * 12_345 + ["w1 w2 w3"]
    assert longest_prompt(dataset(prompts), None, tokenizer(), None) == 3


def test_evaluation_sets_count():
    train, long = dataset(["w1"]), dataset(TEXTS)
    assert longest_prompt(train, long, tokenizer(), None) == 4
    assert longest_prompt(train, {"a": train, "b": long}, tokenizer(), None) == 4


def test_max_prompt_length_is_a_bound_for_which_nothing_is_read():
    def rows():
        raise AssertionError("the stream was read")
        yield

    stream = IterableDataset.from_generator(rows)
    assert longest_prompt(stream, None, tokenizer(), 77) == 77


def test_of_a_stream_twice_the_longest_of_its_first_rows_is_taken():
    read = []

    def rows():
        for number in range(10 * OF_A_STREAM):
            read.append(number)
            yield {"prompt": "w1 w2 w3" if number == 5 else "w1"}

    assert longest_prompt(IterableDataset.from_generator(rows), None, tokenizer(), None) == 6
    assert len(read) <= OF_A_STREAM + 1


def test_a_stream_whose_rows_have_no_prompt_is_for_other_checks():
    def rows():
        yield {"text": "w1"}

    assert longest_prompt(IterableDataset.from_generator(rows), None, tokenizer(), None) >= 1


def test_a_longer_prompt_later_on_is_told_what_to_set():
    tokenize = tokenizer()
    tokenize.engine_length = 3
    assert len(tokenize([{"prompt": "w1 w2 w3"}])) == 1
    with pytest.raises(UnusableRow, match=r"has 4 tokens.* at most 3.*set vllm_max_model_length"):
        tokenize([{"prompt": TEXTS[1]}])
