"""Values of text files stand in the rows as they stand in the file."""

import bz2
import gzip
import json
import lzma

import datasets
import pytest

from rloo_fast.data import load_prompts, text_files
from rloo_fast.data.column_types import dataset_of
from rloo_fast.data.text_files import load_text_files
from rloo_fast.rewards import load_reward_functions


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(tmp_path, name, text):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    data = text.encode()
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    path.write_bytes(compress.get(path.suffix, bytes)(data))
    return str(path)


def csv_of(cells, separator=","):
    return "".join(f"{row}\n" for row in [f"prompt{separator}answer", *cells])


CELLS = {
    "an empty cell": ["42", "7", ""],
    "leading zeros": ["007", "012"],
    "decimals": ["3.10", "2", "1e5"],
    "words for nothing": ["None", "NA", "null", "NaN", "nan", "N/A", "-"],
    "truths": ["True", "false", "TRUE"],
    "dates": ["2024-01-02", "2023-12-31 10:00"],
    "many digits": ["123456789012345678901234567890", "1"],
    "signs and blanks": ["+5", " 5", "1_000", "0x10", "inf"],
}


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streamed"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.csv.xz"])
@pytest.mark.parametrize("cells", CELLS.values(), ids=CELLS)
def test_a_cell_is_the_text_that_stands_there(tmp_path, cells, name, streaming):
    separator = "\t" if "tsv" in name else ","
    text = csv_of([f"q{separator}{cell}" for cell in cells], separator)
    rows = load_prompts(write(tmp_path, name, text), streaming=streaming)
    answers = [row["answer"] for row in rows]
    assert answers == cells
    rewards = load_reward_functions("exact_match")(
        ["q"] * len(cells), cells, [[1]] * len(cells), {"answer": answers}
    )
    assert rewards.flatten().tolist() == [1.0] * len(cells)


JSON_VALUES = {
    "dates": ["2024-01-02", "2023-12-31T10:00:00", "2023-12-31 10:00:00Z"],
    "int and float": [5, 5.5, 5.0, 0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308],
    "many digits": [12345678901234567890123, 5, -(2**63) - 1, [2**64, "x"], {"a": 10**30}, "5"],
    "text and numbers": ["5", 5, "007", 5.5, True, "true", None],
    "ints and nothing": [1, None, 2],
    "in lists": [[1, 2.5], [], [3, None], ["2024-01-02"]],
    "in objects": [{"when": "2024-01-02", "v": 5}, {"when": "2024-01-03", "v": 5.5}],
    "objects with other keys": [{"a": 1}, {"b": 2}, {}, {"a": {"c": []}}],
    "texts that are JSON": ["[1]", "null", '"x"', "{}"],
    "messages of two kinds": [
        [{"role": "user", "content": "x"}],
        [{"role": "user", "content": "x", "name": "n"}, {"role": "tool", "content": None}],
    ],
}


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streamed"])
@pytest.mark.parametrize(
    "kind", ["a.jsonl", "a.ndjson", "array.json", "lines.json", "a.jsonl.bz2", "array.jsonl"]
)
@pytest.mark.parametrize("values", JSON_VALUES.values(), ids=JSON_VALUES)
def test_a_json_value_is_what_json_says_it_is(tmp_path, values, kind, streaming):
    rows = [{"prompt": "q", "answer": value} for value in values]
    lines = "\n".join(map(json.dumps, rows))
    text = json.dumps(rows, indent=1) if kind.startswith("array") else lines
    got = [row["answer"] for row in load_prompts(write(tmp_path, kind, text), streaming=streaming)]
    assert repr(got) == repr(values)  # 5 is not 5.0


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streamed"])
def test_a_column_that_a_row_lacks_is_none(tmp_path, streaming):
    text = '{"prompt": "a", "x": 1}\n\n{"prompt": "b", "y": "z"}\n'
    rows = load_prompts(write(tmp_path, "a.jsonl", text), streaming=streaming)
    assert list(rows) == [
        {"prompt": "a", "x": 1, "y": None}, {"prompt": "b", "x": None, "y": "z"},
    ]  # fmt: skip
    rows = load_prompts(write(tmp_path, "a.csv", "prompt,x\na,1\nb\n"), streaming=streaming)
    assert [row["x"] for row in rows] == ["1", None]


def test_quotes_line_ends_and_a_byte_order_mark(tmp_path):
    text = '\ufeff\r\nprompt,answer\r\n"a, ""b""","two\nlines"\r\n'
    assert list(load_prompts(write(tmp_path, "a.csv", text))) == [
        {"prompt": 'a, "b"', "answer": "two\nlines"}
    ]


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streamed"])
def test_types_on_request(tmp_path, streaming):
    text = 'prompt,i,f,b,j,s\nq,007,3.10,yes,"[1, ""x""]",7\nq,,,,,\n'
    types = {"i": "int", "f": "float", "b": "bool", "j": "json", "s": "str"}
    first, second = load_prompts(write(tmp_path, "a.csv", text), types=types, streaming=streaming)
    assert first == {"prompt": "q", "i": 7, "f": 3.1, "b": True, "j": [1, "x"], "s": "7"}
    assert second == {"prompt": "q", "i": None, "f": None, "b": None, "j": None, "s": ""}
    lines = write(tmp_path, "a.jsonl", '{"prompt": "q", "f": 5, "s": 5}\n')
    (row,) = load_prompts(lines, types={"f": "float", "s": "str"}, streaming=streaming)
    assert repr(row) == repr({"prompt": "q", "f": 5.0, "s": "5"})


@pytest.mark.parametrize(
    ("types", "sentence"),
    [
        (
            {"answer": "int"},
            "row 1 (counted from 0): the column 'answer' has '5.5', which is no int",
        ),
        ({"answer": "date"}, "'answer' is one of int, float, bool, json, str, got 'date'"),
        ({"x": "int"}, "dataset_types names 'x', but the columns are ['answer', 'prompt']"),
    ],
    ids=["no int", "unknown type", "unknown column"],
)
def test_types_that_do_not_fit(tmp_path, types, sentence):
    path = write(tmp_path, "a.csv", "prompt,answer\nq,5\nq,5.5\n")
    with pytest.raises(ValueError, match="dataset") as caught:
        load_prompts(path, types=types)
    assert sentence in str(caught.value)


def test_files_with_types_of_their_own_take_no_others(tmp_path):
    datasets.Dataset.from_dict({"prompt": ["q"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has types of its own"):
        load_prompts(str(tmp_path / "a.parquet"), types={"prompt": "str"})


def test_a_directory_of_text_files(tmp_path):
    write(tmp_path, "d/train.csv", "prompt,answer\nq,007\nr,None\n")
    write(tmp_path, "d/test.csv", "prompt,answer\nq,1.0\n")
    name = str(tmp_path / "d")
    assert [row["answer"] for row in load_prompts(name)] == ["007", "None"]
    assert [row["answer"] for row in load_prompts(name, split="test")] == ["1.0"]
    assert [row["answer"] for row in load_prompts(name, split="train[1:]")] == ["None"]


@pytest.mark.parametrize("name", ["train.ndjson", "train.csv.xz", "train.jsonl.bz2"])
def test_a_directory_has_no_other_types_than_its_files(tmp_path, name):
    text = "prompt,answer\nq,007\n" if "csv" in name else '{"prompt": "q", "answer": "007"}\n'
    write(tmp_path, f"d/{name}", text)
    assert list(load_prompts(str(tmp_path / "d"))) == [{"prompt": "q", "answer": "007"}]


def test_a_directory_of_text_whose_types_only_datasets_would_guess(tmp_path):
    write(tmp_path, "d/train.json5", '{"prompt": "q", "answer": "2024-01-02"}\n')
    with pytest.raises(ValueError, match="dataset"):
        load_prompts(str(tmp_path / "d"))


def test_values_that_json_alone_can_hold_outlive_a_filter_and_a_disk(tmp_path):
    values = [1 / 3, 2**64, "5", None, {"a": [2**70]}]
    lines = "\n".join(json.dumps({"prompt": "q", "answer": value}) for value in values)
    rows = load_prompts(write(tmp_path, "a.jsonl", lines))
    rows.filter(lambda row: row["answer"] != "5").save_to_disk(tmp_path / "saved")
    saved = load_prompts(str(tmp_path / "saved"))
    assert [row["answer"] for row in saved] == [1 / 3, 2**64, None, {"a": [2**70]}]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", 'prompt,answer\n"a,x\n', "line 2: unexpected end of data"),
        ("a.csv", "prompt,prompt\na,b\n", "line 1: the column 'prompt' is there twice"),
        ("a.jsonl", '{"prompt": "a"}\n["b"]\n', "line 2: expected an object such as"),
        ("a.json", '["a"]', "expected objects such as"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "\\ud83d"}\n', "line 2: a text has half of"),
        ("a.json", '{"prompt": "a"}\n{"prompt" "b"}', "line 2: not valid JSON"),
    ],
    ids=["open quote", "column twice", "no object", "texts", "half a character", "second line"],
)
def test_a_damaged_file(tmp_path, name, text, sentence):
    with pytest.raises(ValueError, match="dataset") as caught:
        load_prompts(write(tmp_path, name, text))
    assert sentence in str(caught.value)


# --- what would bring Python or Arrow down


def nested(kind: str, depth: int) -> str:
    return "[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize("depth", [16, 17, 64, 99])
def test_deep_values_come_back_as_they_were(tmp_path, kind, depth):
    text = f'{{"prompt": "x", "a": {nested(kind, depth)}}}'
    (tmp_path / "p.jsonl").write_text(text)
    assert load_text_files([tmp_path / "p.jsonl"], {}, streaming=False)[0] == json.loads(text)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        *((nested(kind, depth), "it is nested more than 100 levels deep.")
          for kind in ("list", "dict") for depth in (101, 900, 20_000)),
        ("1" * 5000, "it has an integer of more than 4300 digits."),
        ('"\\ud800"', "a text has half of a surrogate pair"),
    ],
    ids=lambda value: value[:8] + str(len(value)),
)  # fmt: skip
def test_json_beyond_all_bounds(tmp_path, name, streaming, value, sentence):
    (tmp_path / name).write_text(f'{{"prompt": "x", "a": {value}}}\n')
    with pytest.raises(ValueError, match=r"p\.json.*: ") as caught:
        load_text_files([tmp_path / name], {}, streaming=streaming)
    assert sentence in str(caught.value)


def test_rows_of_a_function_are_bounded_as_well():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested more than 100 levels deep"):
        dataset_of([{"prompt": "x", "a": deep}])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl.gz", b'{"prompt": "' + b"a" * 5000), ("p.jsonl", b" " * 5000),
        ("p.csv.gz", b"prompt\n" + b"a" * 5000), ("p.csv", b'prompt\n"' + b"a\n" * 5000),
        ("p.json.gz", b"[" + b" " * 9000),
    ],
)  # fmt: skip
def test_a_small_file_that_unpacks_to_much_is_not_held_in_memory(tmp_path, monkeypatch, name, text):
    monkeypatch.setattr(text_files, "MAX_LINE", 4096)
    monkeypatch.setattr(text_files, "MAX_WHOLE", 8192)
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    with pytest.raises(ValueError, match=r"MiB or more|field larger than field limit"):
        load_text_files([tmp_path / name], {}, streaming=False)
