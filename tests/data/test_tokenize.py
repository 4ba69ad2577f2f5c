"""Dataset rows -> prompts: token ids, columns, and the rows that are refused."""

import pytest

from rloo_fast.data.tokenize import is_conversational, tokenize
from tests.support.tiny import CHAT_TEMPLATE, make_tokenizer

CHAT = [{"role": "user", "content": "w1 w2"}]


def tokens(*rows, tokenizer=None, **kwargs):
    options = {"chat_template_kwargs": {}, "max_prompt_tokens": None, **kwargs}
    return tokenize(list(rows), tokenizer or make_tokenizer(), **options)


def test_a_text_and_its_columns():
    row = {"prompt": "w0 w2", "answer": 7, "completion": "w1", "completion_ids": [3]}
    (prompt,) = tokens(row)
    assert (prompt.text, prompt.ids, prompt.columns) == ("w0 w2", [6, 8], {"answer": 7})


def test_columns_are_dropped_on_request():
    (prompt,) = tokens({"prompt": "w0", "answer": 7}, keep_columns=False)
    assert prompt.columns == {}


def test_messages_go_through_the_chat_template_up_to_the_assistant_s_turn():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    (prompt,) = tokens({"prompt": CHAT}, tokenizer=tokenizer)
    assert prompt.text == CHAT
    assert tokenizer.convert_ids_to_tokens(prompt.ids) == ["user", "w1", "w2", "assistant"]


def test_arguments_for_the_chat_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ 'w3' if short else 'w4 w4' }}"
    (prompt,) = tokens({"prompt": CHAT}, tokenizer=tokenizer, chat_template_kwargs={"short": True})
    assert tokenizer.convert_ids_to_tokens(prompt.ids) == ["w3"]


@pytest.mark.parametrize(("value", "want"), [
    (CHAT, True), ("w0", False), ([], False), ([{"text": "w0"}], False), (["w0"], False),
], ids=str)  # fmt: skip
def test_what_a_conversation_is(value, want):
    assert is_conversational(value) is want


@pytest.mark.parametrize(
    ("empty", "sentence"), [("", "a prompt is empty"), (" ", "a prompt has no tokens")]
)
def test_an_empty_prompt(empty, sentence):
    with pytest.raises(ValueError, match=sentence):
        tokens({"prompt": "w0"}, {"prompt": empty})


@pytest.mark.parametrize("wrong", [None, 7, ["w0"], {"role": "user"}, []], ids=str)
def test_a_prompt_of_a_wrong_type(wrong):
    with pytest.raises(ValueError, match=r"must be a string or a list of .* messages, got"):
        tokens({"prompt": wrong})


def test_a_prompt_that_is_too_long_is_told_with_numbers():
    with pytest.raises(ValueError, match=r"has 3 tokens, but only 2 fit .*begins 'w0 w1 w2'"):
        tokens({"prompt": "w0 w1"}, {"prompt": "w0 w1 w2"}, max_prompt_tokens=2)


def test_a_long_prompt_is_not_printed_whole():
    with pytest.raises(ValueError) as caught:
        tokens({"prompt": "w0 " * 5000}, max_prompt_tokens=2)
    assert len(str(caught.value)) < 400


def test_conversations_and_texts_together():
    with pytest.raises(ValueError, match="some prompts are conversations and some are not"):
        tokens({"prompt": "w0"}, {"prompt": CHAT})


def test_a_conversation_without_a_chat_template():
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        tokens({"prompt": CHAT})


def test_a_chat_template_that_fails_on_a_prompt():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"template fails on a prompt .*no system role.*'w1 w2'"):
        tokens({"prompt": CHAT}, tokenizer=tokenizer)
