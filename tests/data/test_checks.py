"""Datasets that a run cannot use, told before a model is loaded."""

import datasets
import pytest

from rloo_fast.config.rloo_config import RLOOConfig
from rloo_fast.data.checks import check_dataset, check_prompts
from rloo_fast.data.tokenize import RowTokenizer
from tests.data.test_loader import rows_of
from tests.support.tiny import make_tokenizer


def check(dataset):
    check_dataset(dataset, "train_dataset")
    tokenize = RowTokenizer.from_config(make_tokenizer(), None, RLOOConfig("unused", use_cpu=True))
    check_prompts(dataset, None, tokenize, None, prompts_per_batch=1)


@pytest.mark.parametrize(("columns", "message"), [
    ({"question": ["w0"]}, r"has no column 'prompt', only \['question'\]"),
    ({"input_ids": [[1]]}, "Tokenised datasets of the 2024 trainer are not taken"),
    ({"prompt": ["w0"], "image": ["x"]}, "a row has an image, and the run has no processor"),
    ({"prompt": []}, "is empty"),
    ({"prompt": ["w0", ""]}, "train_dataset: a prompt is empty"),
], ids=["question", "input_ids", "image", "no-rows", "empty-prompt"])  # fmt: skip
def test_datasets_that_cannot_be_used(columns, message):
    with pytest.raises(ValueError, match=message):
        check(datasets.Dataset.from_dict(columns))


def test_a_list_is_no_dataset():
    with pytest.raises(
        TypeError, match="must be a `Dataset` or `IterableDataset` of datasets, got `list`"
    ):
        check([{"prompt": "w0"}])


def test_a_split_must_be_chosen():
    with pytest.raises(TypeError, match=r"got `DatasetDict`\. Pass one of its splits"):
        check(datasets.DatasetDict(train=rows_of(3)))


def test_an_empty_stream_is_no_dataset():
    with pytest.raises(ValueError, match="it ended without a single row"):
        check(datasets.IterableDataset.from_generator(lambda: iter(())))


def test_a_usable_dataset_passes():
    check(rows_of(3))
    check(rows_of(3).to_iterable_dataset())
