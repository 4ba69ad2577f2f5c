"""load_prompts: every kind of source, and what it says when there is nothing to load."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset, DatasetDict

from rloo_fast.data.sources import load_prompts

ROWS = [{"prompt": "a b", "answer": 1}, {"prompt": "c", "answer": 2}]
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path, rows=ROWS) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write(kind: str, path) -> str:
    """ROWS in a file of this kind."""
    rows = Dataset.from_list(ROWS)
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "jsonl":
        write_jsonl(path)
    elif kind == "tsv":
        path.write_text("prompt\tanswer\na b\t1\nc\t2\n")
    elif kind == "csv":
        rows.to_csv(path)
    elif kind == "parquet":
        rows.to_parquet(path)
    else:
        rows.save_to_disk(path.parent / "saved")
        (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)
    return str(path)


# --- what can be loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "arrow"])
def test_a_file_of_every_kind_gives_the_same_rows(tmp_path, kind):
    types = {"answer": "int"} if kind in ("csv", "tsv") else None
    assert list(load_prompts(write(kind, tmp_path / f"rows.{kind}"), types=types)) == ROWS


def test_conversations_come_back_as_they_were_written(tmp_path):
    name = write_jsonl(tmp_path / "chat.jsonl", [{"prompt": MESSAGES, "tests": ["x", "y"]}])
    assert list(load_prompts(name)) == [{"prompt": MESSAGES, "tests": ["x", "y"]}]


def test_a_slice_of_a_file(tmp_path):
    rows = load_prompts(write_jsonl(tmp_path / "p.jsonl"), split="train[:1]")
    assert list(rows) == ROWS[:1]


def test_a_directory_of_data_files_has_their_splits(tmp_path):
    write_jsonl(tmp_path / "d/train.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "d/test.jsonl", ROWS[1:])
    assert list(load_prompts("d", split="test")) == ROWS[1:]


def test_a_saved_dataset(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert list(load_prompts(str(tmp_path / "saved"))) == ROWS


def test_a_saved_dataset_with_splits(tmp_path):
    splits = {"train": Dataset.from_list(ROWS[:1]), "test": Dataset.from_list(ROWS[1:])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert list(load_prompts("saved", split="test")) == ROWS[1:]


@pytest.mark.parametrize("with_splits", [True, False])
def test_a_slice_of_a_saved_dataset(tmp_path, with_splits):
    rows = Dataset.from_list(ROWS)
    (DatasetDict(train=rows, test=rows) if with_splits else rows).save_to_disk(tmp_path / "d")
    assert [*load_prompts(str(tmp_path / "d"), split="train[1:]")] == ROWS[1:]
    assert [*load_prompts(str(tmp_path / "d"), split="train[:50%]")] == ROWS[: len(ROWS) // 2]
    assert "split 'train[x]': Unrecognized" in refusal(str(tmp_path / "d"), split="train[x]")


def test_a_stream(tmp_path):
    rows = load_prompts(write_jsonl(tmp_path / "p.jsonl"), streaming=True)
    assert isinstance(rows, datasets.IterableDataset)
    assert list(rows) == ROWS


def test_an_edited_file_is_read_again(tmp_path):
    name = write_jsonl(tmp_path / "p.jsonl")
    load_prompts(name)
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "new"}])
    assert list(load_prompts(name)) == [{"prompt": "new"}]


def test_loading_is_silent_and_leaves_progress_bars_as_they_were(tmp_path, capfd):
    before = datasets.are_progress_bars_disabled()
    load_prompts(write_jsonl(tmp_path / "p.jsonl"))
    assert capfd.readouterr() == ("", "")
    assert datasets.are_progress_bars_disabled() == before


# --- what cannot ----------------------------------------------------------------------------------


def refusal(name, **options) -> str:
    with pytest.raises(ValueError, match=r"dataset") as caught:
        load_prompts(str(name), **options)
    return str(caught.value)


def test_a_file_that_is_not_there_names_the_nearest(tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl")
    assert "no such file or directory (did you mean 'prompts.json" in refusal("promts.jsonl")


def test_what_is_no_file_and_no_directory_is_not_meant_instead():
    assert "'/dev/null': there is no such file or directory, but something" in refusal("/dev/null")


def test_something_that_is_nowhere(tmp_path):
    said = refusal("nobody/nothing")
    assert "there is no such file or directory here, and the hub said: " in said


@pytest.mark.parametrize("name", ["./x", "a/b/c", "~/nowhere/x", "/nowhere"])
def test_a_path_is_not_looked_for_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    assert "there is no such file or directory" in refusal(name)


def test_a_file_of_an_unknown_kind(tmp_path):
    (tmp_path / "p.txt").write_text("prompt")
    assert "expected a .jsonl, .ndjson, .json, .csv" in refusal("p.txt")


@pytest.mark.parametrize(
    ("kind", "text"),
    [("jsonl", ""), ("jsonl", "\n\n"), ("json", "[]"), ("csv", "prompt\n"), ("parquet", None)],
)
def test_a_file_without_rows(tmp_path, kind, text):
    path = tmp_path / f"p.{kind}"
    if text is None:
        Dataset.from_dict({"prompt": []}).to_parquet(path)
    else:
        path.write_text(text)
    assert "is empty: it needs at least one row" in refusal(path)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            b'{"prompt": "x" "answer": 1}',
            "line 2: not valid JSON: Expecting ',' delimiter at column",
        ),
        (b'{"prompt": "x"', "line 2: not valid JSON"),
        (b'{"prompt": "\xff"}', "line 2: not UTF-8 text."),
    ],
)
def test_a_damaged_jsonl_names_the_line(tmp_path, line, sentence):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
    assert sentence in refusal("p.jsonl")


def test_a_damaged_json_names_line_and_column(tmp_path):
    (tmp_path / "p.json").write_text('[{"prompt": "a"},\n {"prompt" "b"}]')
    assert "line 2, column 12: not valid JSON" in refusal("p.json")


def test_a_damaged_csv_names_the_line(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,answer\na,1\nb,2,3\n")
    assert "line 3: expected 2 fields, saw 3" in refusal("p.csv")


def test_a_damaged_parquet_file(tmp_path):
    (tmp_path / "p.parquet").write_text("nothing of the sort")
    assert "p.parquet': " in refusal("p.parquet")


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        ({"question": "q", "answer": "a"}, "['answer', 'question']. Rename 'question' to it."),
        ({"Promt": "q"}, "['Promt']. Rename 'Promt' to it."),
        ({"x": "q"}, "only ['x']."),
    ],
)
def test_a_missing_prompt_column_names_those_there_are(tmp_path, columns, hint):
    said = refusal(write_jsonl(tmp_path / "p.jsonl", [columns]))
    assert said.endswith(hint)


def test_a_row_without_a_prompt_is_named(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": None}, {"prompt": "b"}]
    assert "row 1 has no prompt" in refusal(write_jsonl(tmp_path / "p.jsonl", rows))


@pytest.mark.parametrize("prompt", [3, ["a", "b"], [], [{"text": "x"}]])
def test_a_prompt_that_is_neither_text_nor_messages(tmp_path, prompt):
    said = refusal(write_jsonl(tmp_path / "p.jsonl", [{"prompt": prompt}]))
    assert 'a list of messages such as {"role": "user"' in said


def test_a_file_has_no_other_split(tmp_path):
    said = refusal(write_jsonl(tmp_path / "p.jsonl"), split="test")
    assert "a file has one split, 'train', not 'test'" in said


def test_a_split_that_a_directory_lacks(tmp_path):
    write_jsonl(tmp_path / "d/train.jsonl")
    assert "['train']" in refusal("d", split="test")


def test_a_split_that_a_saved_dataset_lacks(tmp_path):
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert "has the splits ['train'], not 'test'" in refusal("saved", split="test")


def test_a_saved_dataset_without_splits(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert "was saved without splits, so there is no 'test'" in refusal("saved", split="test")


def test_an_empty_directory(tmp_path):
    (tmp_path / "d").mkdir()
    assert "doesn't contain any data files" in refusal("d")


def test_a_task_config_is_for_tasks_only(tmp_path):
    said = refusal(write_jsonl(tmp_path / "p.jsonl"), task_config={"max_terms": 2})
    assert "write the configuration of a hub dataset as dataset_subset" in said


@pytest.mark.parametrize("name", ["p.jsonl", "reasoning_gym:chain_sum"])
def test_a_configuration_of_what_has_none(tmp_path, name):
    write_jsonl(tmp_path / "p.jsonl")
    assert "leave out dataset_subset" in refusal(name, subset="main")


# --- procedural tasks -----------------------------------------------------------------------------


def test_a_task_is_made_with_size_seed_and_its_own_settings(monkeypatch):
    asked = []
    fake = SimpleNamespace(load_reasoning_gym=lambda *args, **config: asked.append((args, config)))
    monkeypatch.setitem(sys.modules, "rloo_fast.data.reasoning_gym_tasks", fake)
    load_prompts("reasoning_gym:chain_sum", size=5, seed=7, task_config={"max_terms": 2})
    assert asked == [(("chain_sum", 5, 7), {"max_terms": 2, "exclude_prompts": ()})]


@pytest.mark.parametrize("key", ["size", "seed"])
def test_size_and_seed_of_a_task_are_set_in_one_place(monkeypatch, key):
    monkeypatch.setitem(
        sys.modules, "rloo_fast.data.reasoning_gym_tasks", SimpleNamespace(load_reasoning_gym=None)
    )
    said = refusal("reasoning_gym:chain_sum", task_config={key: 3})
    assert f"dataset_config sets '{key}': write dataset_size or seed instead." in said


def test_items_of_a_task_follow_the_seed():
    config = {"min_terms": 2, "max_terms": 2}
    three = load_prompts("reasoning_gym:chain_sum", size=3, seed=7, task_config=config)
    last = load_prompts("reasoning_gym:chain_sum", size=1, seed=9, task_config=config)
    assert three[2]["prompt"] == last[0]["prompt"]
    assert len(three) == 3


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="chain_sun"):
        load_prompts("reasoning_gym:chain_sun")
