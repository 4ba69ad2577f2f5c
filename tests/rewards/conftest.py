"""A reward model on the disk."""

import pytest

from tests.support.rewards import TEMPLATE, make_model, make_tokenizer


@pytest.fixture(scope="session")
def reward_model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-reward"
    make_model().save_pretrained(path)
    make_tokenizer(eos_token="</s>", chat_template=TEMPLATE).save_pretrained(path)
    return path
