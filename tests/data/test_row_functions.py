"""dataset_map: rows into rows with a prompt, by the recipes' functions and the user's."""

from __future__ import annotations

import json
from datetime import date

import pytest
from datasets import Dataset

from rloo_fast.data.images import row_images
from rloo_fast.data.row_functions import first_five_words, load_row_function, map_rows, mbpp_chat
from rloo_fast.data.sources import load_prompts
from tests.support.vision import picture


def number(row):
    """Even numbers only."""
    return {"prompt": f"{row['n']} is?"} if row["n"] % 2 == 0 else None


ROWS = Dataset.from_dict({"n": [0, 1, 2, 3], "other": ["x"] * 4})


FORMS = pytest.mark.parametrize("rows", [ROWS, ROWS.to_iterable_dataset()], ids=["whole", "stream"])
FAILED = ".*fails with ZeroDivisionError: .*'n', 'other'"


@FORMS
def test_the_new_rows_have_their_own_columns_only(rows):
    assert [*map_rows(rows, number, "numbers")] == [{"prompt": "0 is?"}, {"prompt": "2 is?"}]


@FORMS
def test_a_function_that_fails_is_told_with_its_row(rows):
    def bad(row):
        return {"prompt": 1 // (1 - row["n"])}

    with pytest.raises(ValueError, match=f"'numbers', row 1 {FAILED}"):
        [*map_rows(rows, bad, "numbers")]


@FORMS
def test_a_function_that_returns_no_row(rows):
    with pytest.raises(ValueError, match=r"'numbers', row 0 .* as a dict, or None .* got str\.$"):
        [*map_rows(rows, lambda row: "a prompt", "numbers")]


@FORMS
def test_values_stay_what_the_function_returned(rows):
    answers = [5, 5.5, "007", {"a": [1, 2.5]}]
    made = map_rows(rows, lambda row: {"prompt": "p", "answer": answers[row["n"]]}, "n")
    assert repr([row["answer"] for row in made]) == repr(answers)
    days = [date(2024, 1, 2), None, date(2024, 1, 3), None]
    made = map_rows(rows, lambda row: {"prompt": "p", "day": days[row["n"]]}, "n")
    assert [row["day"] for row in made] == days


def test_columns_are_those_of_all_rows():
    rows = map_rows(ROWS, lambda row: {"prompt": "p", **({"more": 1} if row["n"] else {})}, "n")
    assert rows["more"][:] == [None, 1, 1, 1]


def test_a_stream_asks_once_per_row_and_as_it_is_read():
    asked = []

    def noting(row):
        asked.append(row["n"])
        return number(row)

    rows = iter(map_rows(ROWS.to_iterable_dataset(), noting, "numbers"))
    assert asked == []
    assert next(rows) == {"prompt": "0 is?"}
    assert next(rows) == {"prompt": "2 is?"}
    assert asked == [0, 1, 2]


def test_a_function_that_leaves_nothing():
    with pytest.raises(ValueError, match="dataset_map left none of its 4 rows"):
        map_rows(ROWS, lambda row: None, "numbers")


def test_a_file_is_mapped_before_its_prompts_are_checked(tmp_path):
    file = tmp_path / "n.jsonl"
    file.write_text("\n".join(json.dumps({"n": n}) for n in range(4)))
    rows = load_prompts(str(file), split="train[:3]", row_function=number)
    assert rows["prompt"][:] == ["0 is?", "2 is?"]  # pyright: ignore
    with pytest.raises(ValueError, match="no column 'prompt'"):
        load_prompts(str(file), row_function=lambda row: {"text": "x"})


def test_a_task_has_its_prompts():
    with pytest.raises(ValueError, match="leave out dataset_map"):
        load_prompts("reasoning_gym:chain_sum", row_function=number)


# --- by name


def test_functions_of_files_and_modules(tmp_path, monkeypatch):
    (tmp_path / "mine_rows.py").write_text("def f(row):\n    return {'prompt': row['q']}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{tmp_path}/mine_rows.py:f", "mine_rows:f"):
        assert load_row_function(name)({"q": "why"}) == {"prompt": "why"}
    assert load_row_function("first_five_words") is first_five_words


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("five_words", "expected one of first_five_words, mbpp_chat, clevr_count, module:function"),
        ("no.py:f", "FileNotFoundError"),
        ("nowhere:f", "No module named 'nowhere'"),
        ("json:f", "there is no function 'f' in json"),
    ],
)
def test_a_name_of_nothing(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_row_function(name)


# --- the recipes' own


def test_a_review_gives_its_first_five_words():
    assert first_five_words({"text": "one two  three\nfour five six", "label": 0}) == {
        "prompt": "one two three four five"
    }
    assert first_five_words({"text": "too short a review", "label": 0}) is None


def test_a_task_of_mbpp_becomes_a_message_with_its_tests():
    row = {
        "task_id": 1, "text": "Write f. ", "code": "def f(): return 1",
        "test_list": ["assert f() == 1", "assert f() > 0"], "test_setup_code": "import re",
        "challenge_test_list": [],
    }  # fmt: skip
    made = mbpp_chat(row)
    [message] = made["prompt"]
    assert message["role"] == "user"
    assert message["content"].startswith("Write f.\n")
    assert "assert f() == 1\nassert f() > 0\n" in message["content"]
    assert row["code"] not in message["content"]
    assert (made["test_list"], made["test_setup_code"]) == (row["test_list"], "import re")


def test_clevr_becomes_a_question_with_its_image_as_it_is_stored():
    rows = Dataset.from_list(
        [
            {"image": picture(i), "problem": "How many? ", "solution": f"<answer> {i} </answer>"}
            for i in (3, 4)
        ]
    )
    made = map_rows(rows, load_row_function("clevr_count"), "clevr")
    assert made[1]["prompt"][0]["content"] == "How many? Answer with the number alone."
    assert (made[0]["answer"], made[1]["answer"]) == ("3", "4")
    assert sorted(made[0]["image"]) == ["bytes", "path"]
    (image,) = row_images(made[1])
    assert image.tobytes() == picture(4).tobytes()
