"""A name -> a dataset with a `prompt` column: files, directories, the hub, procedural tasks."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.paths import user_path
from .column_types import check_types
from .plain_names import plain_name
from .row_functions import Row, map_rows
from .text_files import kind_of, load_text_files

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}  # files that have types of their own
KINDS = "a .jsonl, .ndjson, .json, .csv or .tsv (also .gz, .bz2, .xz), .parquet or .arrow file"
TASK = "reasoning_gym:"
# Names that datasets give to the prompt column
LIKE_PROMPT = ("question", "problem", "query", "instruction", "input", "messages", "text")


def load_prompts(
    name: str,
    *,
    split: str = "train",
    subset: str | None = None,
    size: int = 10_000,
    seed: int = 42,
    task_config: Mapping[str, Any] | None = None,
    exclude_prompts: Container[str] = (),
    streaming: bool = False,
    row_function: Callable[[Row], Row | None] | None = None,
    types: Mapping[str, str] | None = None,
    bad_rows: bool = False,
) -> Dataset | IterableDataset:
    """The rows of `name` with their `prompt`; other columns are for the reward functions.

    name: a data file, a directory (of `save_to_disk`, or of data files), a hub id, or
    `reasoning_gym:TASK`: `size` items from `seed` on, with the settings `task_config`, none of
    `exclude_prompts`; a task has no splits. `row_function`: makes the rows from those it has.
    `types`: column -> int, float, bool, json or str, for text files, whose values are otherwise as
    written. `bad_rows`: rows without a usable prompt are let through.
    Raises ValueError, in one sentence, for anything that gives no such rows.
    """
    check_types(types := types or {})
    if subset and (name.startswith(TASK) or has_one_split(name)):
        raise ValueError(f"dataset {name!r} has no configurations: leave out dataset_subset.")
    if row_function is not None and name.startswith(TASK):
        raise ValueError(f"dataset {name!r} is made with its prompts: leave out dataset_map.")
    if name.startswith(TASK):
        config = dict(task_config or {})
        return _load_task(name.removeprefix(TASK), size, seed, config, exclude_prompts)
    if task_config:
        raise ValueError(
            f"dataset_config={dict(task_config)} is for {TASK}TASK, but the dataset is {name!r}: "
            "write the configuration of a hub dataset as dataset_subset."
        )
    path = user_path(name)
    with _quiet():
        if path.is_file():
            rows = _load_file(path, split, streaming, types)
        elif path.is_dir():
            rows = _load_directory(path, split, subset, streaming, types)
        elif looks_like_path(name) or path.suffix in BUILDERS or kind_of(path):
            raise ValueError(f"dataset {name!r}: there is no such file or directory{_near(path)}.")
        else:
            _no_types(types, name)
            rows = _load_from_hub(name, split, subset, streaming)
    if row_function is not None:
        rows = map_rows(rows, row_function, name)
    if not bad_rows:
        check_prompts(rows, name)
    return rows


def looks_like_path(name: str) -> bool:
    """True for what cannot be a hub id: ./x, /x, ~/x, a/b/c."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def has_one_split(name: str) -> bool:
    """True for a file, and for a directory that `Dataset.save_to_disk` wrote: `train`."""
    path = user_path(name)
    return path.is_file() or (path / "state.json").is_file()


def check_prompts(rows: Any, name: str) -> None:
    """Raise ValueError unless there are rows, with a `prompt` that is text or messages."""
    try:
        first = next(iter(rows), None)
    except Exception as error:  # a stream is read only now
        raise ValueError(f"dataset {name!r}: {_sentence(error)}") from error
    if first is None:
        raise ValueError(f"dataset {name!r} is empty: it needs at least one row with a prompt.")
    if "prompt" not in first:
        near = [c for c in first if c.lower().strip() in ("prompts", *LIKE_PROMPT)]
        near = near or difflib.get_close_matches("prompt", [*first], n=1)
        hint = f" Rename {' or '.join(map(repr, near))} to it." if near else ""
        raise ValueError(f"dataset {name!r} has no column 'prompt', only {sorted(first)}.{hint}")
    if hasattr(rows, "data") and (missing := _first_null(rows)) is not None:
        raise ValueError(f"dataset {name!r}: row {missing} has no prompt (counted from 0).")
    prompt = first["prompt"]
    messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt
    )
    if not (isinstance(prompt, str) or (messages and prompt)):
        raise ValueError(
            f"dataset {name!r}: a prompt must be text, or a list of messages such as "
            f'{{"role": "user", "content": "..."}}, got {prompt!r:.120}.'
        )


def _first_null(rows: Any) -> int | None:
    prompts = rows.select_columns("prompt").with_format("arrow")[:]["prompt"]
    return prompts.is_null().to_pylist().index(True) if prompts.null_count else None


def _load_task(
    task: str, size: int, seed: int, config: dict[str, Any], exclude_prompts: Container[str]
) -> Dataset:
    from .reasoning_gym_tasks import load_reasoning_gym

    for key in {"size", "seed"} & config.keys():
        raise ValueError(f"dataset_config sets {key!r}: write dataset_size or seed instead.")
    return load_reasoning_gym(task, size, seed, exclude_prompts=exclude_prompts, **config)


def _load_file(path: Path, split: str, streaming: bool, types: Mapping[str, str]) -> Any:
    from datasets import load_dataset

    builder = BUILDERS.get(path.suffix.lower())
    if builder is None and kind_of(path) is None:
        raise ValueError(f"dataset {str(path)!r}: expected {KINDS}, got a {path.suffix!r} file.")
    if split.partition("[")[0] != "train":
        raise ValueError(
            f"dataset {str(path)!r}: a file has one split, 'train', not {split!r}. For evaluation "
            "name another file, as eval_dataset_name."
        )
    if builder is None:
        return _part(load_text_files([path], types, streaming=streaming), split, path)
    _no_types(types, str(path))
    if path.stat().st_size == 0:
        raise ValueError(
            f"dataset {str(path)!r} is empty: it needs at least one row with a prompt."
        )
    try:
        file = str(plain_name(path))
        rows: Any = load_dataset(builder, data_files=file, split=split, streaming=streaming)
        if not streaming:
            rows.data.table.validate(full=True)  # else damage shows when its row is read
        return rows
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise ValueError(
                f"dataset {str(path)!r} is empty: it needs at least one row with a prompt."
            ) from error
        raise ValueError(f"dataset {str(path)!r}: {_sentence(error)}") from error


def _no_types(types: Mapping[str, str], name: str) -> None:
    if types:
        raise ValueError(
            f"dataset {name!r} has types of its own: dataset_types is for .csv, .tsv, .json and "
            ".jsonl files."
        )


def _load_directory(
    path: Path, split: str, subset: str | None, streaming: bool, types: Mapping[str, str]
) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    try:
        name = str(plain_name(path))
        if not any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            if texts := _text_files(path, split, subset):
                return _part(load_text_files(texts, types, streaming=streaming), split, path)
            _no_types(types, str(path))
            return load_dataset(name, subset, split=split, streaming=streaming)
        saved = load_from_disk(name)
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("dataset "):
            raise
        raise ValueError(f"dataset {str(path)!r}: {_sentence(error)}") from error
    _no_types(types, str(path))
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    wanted = split.partition("[")[0]
    if wanted not in splits:
        none = "was saved without splits, so there is no"
        has = f"has the splits {[*splits]}, not" if splits is saved else none
        raise ValueError(f"dataset {str(path)!r} {has} {wanted!r}.")
    return _part(splits[wanted], split, path)


def _text_files(path: Path, split: str, subset: str | None) -> list[Path]:
    """The files of a split of a directory, as datasets finds them; [] where they have types.

    Raises ValueError for text of a kind that only datasets reads: it guesses the types.
    """
    from datasets import load_dataset_builder

    folder = plain_name(path)
    builder = load_dataset_builder(str(folder), subset)
    found = (builder.config.data_files or {}).get(split.partition("[")[0], [])
    files = [path / os.path.relpath(file, os.path.abspath(folder)) for file in found]
    other = [file for file in files if kind_of(file) is None]
    if other and type(builder).__name__.lower() in ("csv", "json"):
        raise ValueError(f"dataset {str(path)!r}: expected {KINDS}, got {other[0].name!r}.")
    return [] if other else files


def _part(rows: Any, split: str, path: Path) -> Any:
    """The part of a split's rows that `split` asks for, as in train[:10%]."""
    from datasets import Dataset, ReadInstruction

    wanted, _, part = split.partition("[")
    if not part:
        return rows
    if not isinstance(rows, Dataset):
        raise ValueError(f"dataset {str(path)!r}: a stream has no part {split!r}, only {wanted!r}.")
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({wanted: len(rows)})
    except ValueError as error:
        raise ValueError(f"dataset {str(path)!r}, split {split!r}: {_sentence(error)}") from error
    return rows.select(range(part.from_ or 0, len(rows) if part.to is None else part.to))


def _load_from_hub(name: str, split: str, subset: str | None, streaming: bool) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, subset, split=split, streaming=streaming)
    except Exception as error:
        raise ValueError(
            f"dataset {name!r}: there is no such file or directory here{_near(Path(name))}, and "
            f"the hub said: {_sentence(error)}"
        ) from error


def _near(path: Path) -> str:
    """ ", did you mean ..." if the directory holds a file of nearly that name."""
    parent = path.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    if path.name in names:
        return ", but something that is neither"
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {str(parent / close[0])!r}?)" if close else ""


def _sentence(error: BaseException) -> str:
    """The error's message on one line."""
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__  # it only says that there was an error
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "?", "!")) else f"{text}."


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars for small files, no log lines for errors that are raised anyway."""
    import datasets

    level = datasets.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
