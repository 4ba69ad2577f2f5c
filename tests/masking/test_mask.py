"""Secrets in texts, values and command lines; and what is left alone."""

from __future__ import annotations

import base64
import html
import json
import shlex
import time
from urllib.parse import quote, quote_plus

import pytest

from rloo_fast.masking import (
    MASK,
    find_mask,
    known,
    known_secrets,
    learn,
    masked,
    masked_argv,
    masked_known,
    masked_values,
)

KEY = "kQ7+s'per\"secret/0123456789\\abcdefghij zzzzz-é-end"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(known, "_met", {})


SPELLINGS = {
    "as it is": KEY,
    "repr": repr(KEY)[1:-1],
    "repr of bytes": repr(KEY.encode())[2:-1],
    "JSON": json.dumps(KEY),
    "JSON, not ASCII": json.dumps(KEY, ensure_ascii=False),
    "JSON in JSON": json.dumps(json.dumps({"a": KEY})),
    "shell": shlex.quote(KEY),
    "HTML": html.escape(KEY),
    "URL": quote(KEY),
    "URL, slashes too": quote(KEY, safe=""),
    "URL, small letters": quote(KEY, safe="").replace("%2F", "%2f").replace("%C3%A9", "%c3%a9"),
    "form": quote_plus(KEY),
    "hexadecimal": KEY.encode().hex(),
    **{
        f"password of {user!r}": base64.b64encode(f"{user}:{KEY}".encode()).decode()
        for user in ("", "u", "us", "use")
    },
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 of URLs": base64.urlsafe_b64encode(KEY.encode()).decode(),
}


@pytest.mark.parametrize("spelt", SPELLINGS.values(), ids=SPELLINGS)
def test_a_known_secret_is_found_in_every_spelling(spelt):
    learn({"f": {"api_key": KEY}}, "reward_kwargs")
    text = masked_known(f"before {spelt} after")
    assert MASK in text
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert not any(spelt[at : at + 12] in text for at in range(len(spelt) - 12))


@pytest.mark.parametrize("cut", [slice(0, -1), slice(1, None), slice(0, 30), slice(20, None)])
def test_a_known_secret_that_was_cut_is_found(cut):
    learn(KEY, "api_key")
    assert masked(f"said: {KEY[cut]}") == f"said: {MASK}"


def test_the_password_of_a_header_is_known():
    learn({"headers": {"Authorization": "Basic " + base64.b64encode(b"me:word-of-pass").decode()}})
    assert masked("word-of-pass") == MASK


def test_a_key_with_a_line_break_is_found_on_one_line_and_line_by_line():
    key = "-----BEGIN-abc-0123456789\nabcdefghijklmnop-0123456789"
    learn(key, "private_key")
    assert masked(" ".join(key.split())) == MASK
    assert masked("  abcdefghijklmnop-0123456789 |") == f"  {MASK} |"


@pytest.mark.parametrize("value", ["a", "1", "12", "true", "x1", "token", "password", "12345"])
def test_short_and_common_values_are_not_searched_for(value):
    learn(value, "api_key")
    text = "a 1 12 true x1 token password 12345 and pad_token=x1"
    assert masked(text) == text
    assert masked_values({"api_key": value, "b": value})["b"] == value


@pytest.mark.parametrize("value", ["0.0625", "-1.25e-05", "123456.5", 0.03125, 1234567])
def test_a_number_that_a_metric_may_have_is_not_searched_for(value):
    """metrics.jsonl would be no JSON, and the run could not be resumed."""
    learn(value, "secret_bonus")
    line = f'{{"step": 1, "reward": {value}}}'
    assert masked(line) == line
    assert masked_values({"secret_bonus": value}) == {"secret_bonus": MASK}


@pytest.mark.parametrize("mark", ["<answer>", "</answer>", "<|im_start|>", "[/INST]", "<eos>"])
def test_a_mark_that_models_write_is_no_secret(mark):
    value = {"user_token": mark, "secret_word": mark}
    learn(value)
    assert masked(f"w1 {mark} w2") == f"w1 {mark} w2"
    assert masked_values(value) == value


def test_a_secret_in_brackets_is_one():
    learn("<a8Kz01b2c3d4e5f6g7h8>", "api_key")
    assert masked("is <a8Kz01b2c3d4e5f6g7h8>") == f"is {MASK}"


def test_a_short_secret_is_masked_where_it_stands_alone():
    learn("hunter2", "password")
    assert masked("hunter2, hunter22 and ahunter2") == f"{MASK}, hunter22 and ahunter2"


def test_variables_of_the_environment_are_known(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "value-of-a-variable")
    monkeypatch.setenv("https_proxy", "http://me:proxy-pw-1@proxy:3128")
    monkeypatch.setenv("SOME_DIR", "not-a-secret-at-all")
    assert masked("value-of-a-variable proxy-pw-1 not-a-secret-at-all") == (
        f"{MASK} {MASK} not-a-secret-at-all"
    )
    monkeypatch.delenv("SOME_API_KEY")
    assert "value-of-a-variable" not in known_secrets()


TEXTS = {  # a text -> without its secret
    '{"api_key": "short"}': '{"api_key": "<masked>"}',
    "{'api_key': 'short', 'n': 3}": "{'api_key': '<masked>', 'n': 3}",
    '{\\"api_key\\": \\"short\\"}': '{\\"api_key\\": \\"<masked>\\"}',
    "--hub_token abc --top_k 3": "--hub_token <masked> --top_k 3",
    "hub_token=abc, top_k=3": "hub_token=<masked>, top_k=3",
    "RLOOConfig(hub_token='abc')": "RLOOConfig(hub_token='<masked>')",
    "Authorization: Bearer abc": "Authorization: <masked>",
    '"authorization": "Basic YWJj"': '"authorization": "<masked>"',
    "Cookie: session=abc": "Cookie: <masked>",
    "https://user:pw@host:80/p": "https://<masked>@host:80/p",
    "https://user:p@ss@host/p": "https://<masked>@host/p",
    "postgres://user:p/w@host/db": "postgres://<masked>@host/db",
    "https://abc@host/p?x=1@2": "https://<masked>@host/p?x=1@2",
    "https://host/p?a=1&key=abc&token=abc#x": "https://host/p?a=1&key=<masked>&token=<masked>#x",
    "https://s3/x?X-Amz-Signature=abc": "https://s3/x?X-Amz-Signature=<masked>",
    "got hf_abcdefghijklmnop1234": "got <masked>",
    "got sk-proj-abcdefghijk-1234567890.": "got <masked>.",
    "-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----!": "<masked>!",
    "token=token api_key='api_key'": "token=<masked> api_key='<masked>'",
    "{b'api_key': b'short'}": "{b'api_key': b'<masked>'}",
    "{'password': 'it\\'s short'}": "{'password': '<masked>'}",
    '{"password": "back\\\\", "n": "x"}': '{"password": "<masked>", "n": "x"}',
    "<api_key>short</api_key>": "<api_key><masked></api_key>",
    "curl -u me:short https://h": "curl -u <masked> https://h",
    "https://h/?to=https%3A%2F%2Fme%3Ashort%40h": "https://h/?to=https%3A%2F%2F<masked>%40h",
    'Authorization: Digest a="b", c="d"': "Authorization: <masked>",
    "https://hooks.slack.com/services/T0/B0/xX": "https://hooks.slack.com/services/<masked>",
    "password is a8Kz01b2c3d4e5f6g7": "password is <masked>",
    "api_key: a8Kz01b2c3d4e5f6g7": "api_key: <masked>",
    "DefaultProtocol=https;AccountKey=abc==;Suffix=x": (
        "DefaultProtocol=https;AccountKey=<masked>;Suffix=x"
    ),
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.items())
def test_secrets_in_texts(text, expected):
    assert masked(text) == expected
    assert masked(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hub_token: expected a string, got 5.",
        "hub_token=None api_key='' token=None",
        "pad_token=<pad> stop_token=eos max_tokens=5 num_input_tokens_seen=7 sort_key=name",
        '{"pad_token": "<pad>", "key": "answer", "tokenizer": "Qwen/Qwen2.5-0.5B"}',
        "http://localhost:8000/v1@x and git@github.com:a/b and me@host.org",
        "https://host/p?a=1&monkey=2",
        "Qwen/Qwen2.5-0.5B-Instruct, sk-learn, basic training, bearer of news",
        "the model has learned 12 tokens, each token: one word",
        "org/sk-small-model-2024-instruct-v2 and runs/sk-slovak-bert-base-2024",
    ],
)
def test_innocent_texts_stay(text):
    assert masked(text) == text


def test_values_are_masked_by_their_names_at_any_depth():
    value = {
        "f.py:f": {"api_key": "abc", "scale": 2, "url": "https://u:p@h/", "key": "answer"},
        "deep": [{"x": ({"Authorization": "Bearer abc"},)}, ["token", "abc"], [1, 2]],
        "secrets": {"a": "b", "c": ["d", 5, None, True]},
        "headers": {"X-Own": "abc", "Content-Type": "application/json"},
        "env": [{"name": "WANDB_API_KEY", "value": "abc"}, {"name": "A", "value": "b"}],
        "sort_key": "column_of_2024", "other_key": "a8Kz01b2c3d4e5f6g7",
        "pad_token": "<pad>", "hub_token": None, "api_keys": [],
    }  # fmt: skip
    assert masked_values(value) == {
        "f.py:f": {"api_key": MASK, "scale": 2, "url": f"https://{MASK}@h/", "key": "answer"},
        "deep": [{"x": ({"Authorization": MASK},)}, ["token", MASK], [1, 2]],
        "secrets": {"a": MASK, "c": [MASK, MASK, None, True]},
        "headers": {"X-Own": MASK, "Content-Type": "application/json"},
        "env": [{"name": "WANDB_API_KEY", "value": MASK}, {"name": "A", "value": "b"}],
        "sort_key": "column_of_2024", "other_key": MASK,
        "pad_token": "<pad>", "hub_token": None, "api_keys": [],
    }  # fmt: skip
    assert value["f.py:f"]["api_key"] == "abc"


def test_a_value_that_contains_itself_ends():
    value = {"a": 1}
    value["again"] = value
    assert MASK in str(masked_values(value))


def test_command_lines():
    argv = ["--reward_kwargs", json.dumps({"f.py:f": {"api_key": "é b", "n": 1}}), "--top_k", "3",
            "--hub-token", "x", "--hub_token=y", "--pad_token", "<pad>", "--max_tokens", "5",
            "--reward_kwargs={not JSON 'api_key': 'abc'}", "--judge_kwargs", '{"n":1}'
            ]  # fmt: skip
    assert masked_argv(argv) == [
        "--reward_kwargs", '{"f.py:f": {"api_key": "<masked>", "n": 1}}', "--top_k", "3",
        "--hub-token", MASK, f"--hub_token={MASK}", "--pad_token", "<pad>", "--max_tokens", "5",
        "--reward_kwargs={not JSON 'api_key': '<masked>'}", "--judge_kwargs", '{"n":1}',
    ]  # fmt: skip


HOSTILE = (
    "a-",
    "sk-",
    "eyJaaaaaaaa-",
    "\\",
    "://a:b@",
    "'a':\"",
    "--a ",
    "a='",
    'token=\\"',
    "SG.",
)


@pytest.mark.parametrize("part", HOSTILE)
def test_no_text_takes_long(part):
    """Each repeats what a pattern begins with: time must not grow with the square of the length."""
    begin = time.perf_counter()
    masked(part * (2**16 // len(part)))
    assert time.perf_counter() - begin < 10


def test_where_a_mask_stands():
    assert find_mask({"f": [{"api_key": MASK}]}, "kw") == "kw['f'][0]['api_key']"
    assert find_mask({"f": [{"api_key": "given"}, 3]}, "kw") is None
