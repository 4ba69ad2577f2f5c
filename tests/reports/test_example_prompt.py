"""Whose prompts a model card may show."""

from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from rloo_fast.cli import train
from rloo_fast.cli.arguments import TrainArguments
from rloo_fast.reports.example_prompt import MAX_CHARS, is_public, public_prompt

ROWS = [{"prompt": "a longer prompt"}, {"prompt": "short"}, {"prompt": "middling"}]


@pytest.fixture
def hub(monkeypatch):
    """A Hub that shows some datasets to anybody; what it was asked with."""
    asked = []

    def dataset_info(api, name, timeout):
        asked.append((api.endpoint, api.token, name))
        if name == "someone/absent":
            raise RuntimeError("404")
        return SimpleNamespace(private=name == "me/private",
                               gated="auto" if name == "org/gated" else False)  # fmt: skip

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    return asked


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/open", True),
        ("me/private", False),
        ("org/gated", False),
        ("someone/absent", False),
        ("./data.jsonl", False),
        (None, False),
    ],
)
def test_a_dataset_is_public_where_the_hub_shows_it_to_anybody(hub, name, expected):
    assert is_public(name) == expected


def test_the_hub_is_asked_without_a_token_and_no_mirror_is(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    is_public("org/open")
    assert hub == [("https://huggingface.co", False, "org/open")]


def test_a_directory_here_is_not_the_hubs_dataset(hub, tmp_path, monkeypatch):
    (tmp_path / "org/open").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_public("org/open")
    assert hub == []


def test_the_shortest_prompt_is_shown(hub):
    assert public_prompt("org/open", ROWS) == "short"
    assert public_prompt("reasoning_gym:anything", iter(ROWS)) == "short"
    assert public_prompt("me/private", ROWS) is None


def test_messages_are_shown_without_empty_columns(hub):
    rows = [{"prompt": [{"role": "user", "content": "2 + 2?", "tool_calls": None}]}]
    assert public_prompt("org/open", rows) == [{"role": "user", "content": "2 + 2?"}]


def test_what_would_fill_pages_is_not_shown(hub):
    assert public_prompt("org/open", [{"prompt": "x" * (MAX_CHARS + 1)}]) is None


def test_what_a_row_function_made_of_public_rows_may_be_private(hub):
    script = TrainArguments(dataset_name="org/open")
    assert train.example_prompt(script, ROWS) == "short"
    script.dataset_map = "mine.py:make_row"
    assert train.example_prompt(script, ROWS) is None
    script.model_card_prompt = "given"
    assert train.example_prompt(script, ROWS) == "given"
