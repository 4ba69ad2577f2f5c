"""Settings that nobody writes by mistake: each is one line, at once, in little memory."""

from __future__ import annotations

import json
import time

import pytest
import yaml

from rloo_fast.cli.arguments import train_options
from rloo_fast.cli.input import read_command_line, read_yaml
from rloo_fast.cli.options import UsageError
from rloo_fast.config.json_text import MAX_DEPTH

OPTIONS = train_options()
LEVELS = "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
LAUGHS = f"stop: &a [{', '.join('x' * 9)}]\n{LEVELS}"
MERGES = "x0: &x0 {a: 1}\n" + "".join(
    f"x{i + 1}: &x{i + 1}\n  <<: [*x{i}, *x{i}, *x{i}]\n" for i in range(25)
)  # fmt: skip
YAML: dict[str, tuple[str | bytes, str]] = {
    "a bad date": ("run_name: 2026-13-45", "a value cannot be read (month must be in 1..12)."),
    "a date": ("run_name: 2026-12-24", "line 1: run_name: expected text or none, got date"),
    "an object": ("beta: !!python/object/apply:os.system [id]", "not determine a constructor"),
    "a tag": ("beta: !a 1", "could not determine a constructor for the tag '!a'."),
    "no integer": ("max_steps: !!int a", "a value cannot be read (invalid literal for int()"),
    "no truth": ("bf16: !!bool a", "a value cannot be read ('a')."),
    "no time": ("run_name: !!timestamp a", "a value cannot be read ("),
    "5,000 digits": (f"max_steps: {'1' * 5000}", "a value cannot be read (Exceeds the limit"),
    "depth": ("stop: " + "[" * 3_000, f"it is nested more than {MAX_DEPTH} levels deep."),
    "some depth": (f"stop: {'[' * 150}{']' * 150}", "line 1: it is nested more than"),
    "billion laughs": (LAUGHS, "its aliases multiply to more than a recipe may hold."),
    "laughs under a scalar": (LAUGHS + "output_dir: *i", "its aliases multiply"),
    "a few long laughs": (f"a: &a {'x' * 9**5}\nb: [{'*a, ' * 999}*a]", "its aliases multiply"),
    "laughs by merging": (MERGES, "its aliases multiply"),
    "a part of itself": ("generation_kwargs: &a {b: *a}", "line 1: it is a part of itself."),
    "a key twice": ("beta: 1\nbeta: 2", "line 2: the key 'beta' is there a second time."),
    "a key twice inside": ("generation_kwargs: {a: 1, a: 2}", "the key 'a' is there a second"),
    "a tab": ("beta:\n\t1", "line 2, column 1: not valid YAML: found character"),
    "NUL": ("beta: 1\0", "not valid YAML: unacceptable character #x0000"),
    "UTF-16": ("beta: 1".encode("utf-16"), "it is not UTF-8 text."),
    "half a character": ('run_name: "\\ud800"', "line 1: a text has half of a surrogate pair"),
    "spaces": (" " * 2**21, "it has more than 1 MiB, too many for settings."),
    "a variant without a name": ("variants: {1: {beta: 1}}", "the variant 1 must have a name"),
    "a list as a key": ("? [a]\n: 1", "found unhashable key."),
}  # fmt: skip


@pytest.mark.parametrize("what", YAML)
def test_a_recipe(folder, what):
    text, sentence = YAML[what]
    (folder / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.process_time()
    with pytest.raises(UsageError) as caught:
        read_yaml("r.yaml", OPTIONS)
    assert sentence in str(caught.value)
    assert "r.yaml" in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.process_time() - started < 10


def test_another_librarys_change_to_yaml_changes_no_recipe(folder, monkeypatch):
    as_text = yaml.SafeLoader.yaml_constructors["tag:yaml.org,2002:str"]
    for tag in ("timestamp", "int", "bool"):
        changed = f"tag:yaml.org,2002:{tag}"
        monkeypatch.setitem(yaml.SafeLoader.yaml_constructors, changed, as_text)
    (folder / "r.yaml").write_text("max_steps: 3\nbf16: false\n")
    assert read_yaml("r.yaml", OPTIONS) == {"max_steps": 3, "bf16": False}
    (folder / "r.yaml").write_text("run_name: 2026-12-24")
    with pytest.raises(UsageError, match="expected text or none, got date"):
        read_yaml("r.yaml", OPTIONS)


def test_what_yaml_rightly_has_is_read(folder):
    text = "variants:\n  a: &a {beta: 0.5}\n  b: {<<: *a, max_steps: 3}\nrun_name: '2026-12-24'\n"
    (folder / "r.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    values = {"run_name": "2026-12-24", "beta": 0.5, "max_steps": 3}
    assert read_yaml("r.yaml", OPTIONS, "b") == values


def test_a_recipe_without_end_is_not_read_to_it():
    with pytest.raises(UsageError, match=r"cannot read /dev/zero: it has more than 1 MiB"):
        read_yaml("/dev/zero", OPTIONS)


JSON = {
    "digits": ('{"a": ' + "1" * 5000 + "}", "(it has an integer of more than 4300 digits)."),
    "depth": ('{"a": ' + "[" * 20_000, f"(it is nested more than {MAX_DEPTH} levels deep)."),
    "some depth": (json.dumps({"a": json.loads("[" * 150 + "]" * 150)}), "(it is nested more than"),
    "half a character": ('{"a": "\\ud800"}', "(a text has half of a surrogate pair"),
    "a list": ("[1]", "got '[1]'."),
    "cut": ('{"a"', "(Expecting ':' delimiter at character 5)."),
}
MAPPINGS = [name for name, option in OPTIONS.items() if option.takes_mapping]


@pytest.mark.parametrize("what", JSON)
@pytest.mark.parametrize("place", ["here", "file"])
def test_an_option_that_takes_json(folder, what, place):
    text, sentence = JSON[what]
    (folder / "o.json").write_text(text)
    assert {"reward_kwargs", "deepspeed", "generation_kwargs"} <= {*MAPPINGS}
    for name in MAPPINGS:
        with pytest.raises(UsageError) as caught:
            read_command_line([f"--{name}", text if place == "here" else "o.json"], OPTIONS)
        assert str(caught.value).startswith(f"--{name}: expected ")
        assert place == "file" or sentence in str(caught.value)
        assert len(str(caught.value)) < 400


def test_json_that_python_reads_is_taken():
    given = read_command_line(
        ["--reward_kwargs", '{"a": NaN, "b": "\\u0000", "c": [[1e400]]}'], OPTIONS
    )
    assert str(given) == "{'reward_kwargs': {'a': nan, 'b': '\\x00', 'c': [[inf]]}}"


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(UsageError, match=r"expected UTF-8 text, got 'out\\udcff'\."):
        read_command_line(["--output_dir", b"out\xff".decode(errors="surrogateescape")], OPTIONS)
