"""A path is taken as it is written: no pattern, URL, variable or home that a name looks like."""

from __future__ import annotations

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, IterableDataset

from rloo_fast.config.paths import user_path
from rloo_fast.data import plain_names
from rloo_fast.data.sources import load_prompts

# name: what it would be taken for, and the neighbours that were read in its place
NAMES = {
    "data[1]": ("data1",), "data[!2]": ("data1",), "da?a": ("dawa",), "da*": ("dada",),
    "**": ("x",), "{a,b}": ("a",), "a::b": ("b", "a"), "simplecache::x": ("x",),
    "file:__x": (), "$HOME": ("root",), "%s": (), "~no_such_user": (), "-x": (), "#1": (),
    "a b": (),
    "'q'": (), 'a"b': (), "a\nb": ("a",), "ü": (), "a\\b": ("ab",), "&;|": (), "a=b,c": (),
}  # fmt: skip
FILES = ("jsonl", "csv", "jsonl.gz", "parquet", "arrow")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, prompt: str) -> None:
    table, text = pyarrow.table({"prompt": [prompt]}), json.dumps({"prompt": prompt})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        with path.open("wb") as file:
            pyarrow.parquet.write_table(table, file)
    elif path.suffix == ".arrow":
        with path.open("wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(f"prompt\n{prompt}\n" if path.suffix == ".csv" else text)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", NAMES)
def test_a_file(tmp_path, name, kind):
    write(tmp_path / f"{name}.{kind}", "this one")
    for other in NAMES[name]:
        write(tmp_path / f"{other}.{kind}", "another one")
    for path in (f"{name}.{kind}", str(tmp_path / f"{name}.{kind}")):
        assert load_prompts(path)["prompt"][:] == ["this one"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("name", NAMES)
def test_a_folder(tmp_path, name, kind):
    for folder, prompt in [(name, "this one"), *((n, "another one") for n in NAMES[name])]:
        place = tmp_path / "here" / folder
        if kind == "saved":
            Dataset.from_dict({"prompt": [prompt]}).save_to_disk(tmp_path / "saved")
            place.parent.mkdir(exist_ok=True)
            (tmp_path / "saved").rename(place)
        else:
            write(place / f"train.{kind}", prompt)
            write(place / f"test.{kind}", f"{prompt}, to evaluate on")
    assert load_prompts(str(tmp_path / "here" / name))["prompt"][:] == ["this one"]
    if kind != "saved":
        rows = load_prompts(str(tmp_path / "here" / name), split="test", streaming=True)
        assert [row["prompt"] for row in rows] == ["this one, to evaluate on"]


def test_a_stream_of_a_file(tmp_path):
    write(tmp_path / "data[1].parquet", "this one")
    rows = load_prompts("data[1].parquet", streaming=True)
    assert isinstance(rows, IterableDataset)
    assert list(rows) == [{"prompt": "this one"}]


def test_a_folder_named_like_a_file(tmp_path):
    write(tmp_path / "x.jsonl" / "train.jsonl", "this one")
    assert load_prompts("x.jsonl")["prompt"][:] == ["this one"]


def test_a_changed_file_and_folder_are_read_again(tmp_path):
    for prompt in ("first", "second one"):
        write(tmp_path / "data[1].parquet", prompt)
        write(tmp_path / "d[1]" / f"{prompt[:5]}.parquet", prompt)
        assert load_prompts("data[1].parquet")["prompt"][:] == [prompt]
    assert sorted(load_prompts("d[1]")["prompt"]) == ["first", "second one"]


def test_a_place_that_is_taken_is_said(tmp_path, monkeypatch):
    write(tmp_path / "data[1].parquet", "this one")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / plain_names.LINKS).write_text("")
    with pytest.raises(ValueError, match=r"a link to it cannot be made .*: rename it\."):
        load_prompts("data[1].parquet")


def test_only_a_home_is_a_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(user_path("~/x")) == "/home/me/x"
    assert str(user_path("~no_such_user/x")) == "~no_such_user/x"
