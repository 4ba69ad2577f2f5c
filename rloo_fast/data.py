"""A name -> a dataset with a `prompt` column: files, directories, the hub, procedural tasks."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe_data import Row, map_rows

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
KINDS = "a .jsonl, .json, .csv, .tsv, .parquet or .arrow file"
TASK = "reasoning_gym:"
# What datasets call the text that is put to the model
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
) -> Dataset | IterableDataset:
    """The rows of `name` with their `prompt`; other columns are for the reward functions.

    name: a data file, a directory (of `save_to_disk`, or of data files), a hub id, or
    `reasoning_gym:TASK`: `size` items from `seed` on, with the settings `task_config`, none of
    `exclude_prompts`; a task has no splits. `row_function`: makes the rows from those it has.
    Raises ValueError, in one sentence, for anything that gives no such rows.
    """
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
    path = Path(name).expanduser()
    with _quiet():
        if path.is_file():
            rows = _load_file(path, split, streaming)
        elif path.is_dir():
            rows = _load_directory(path, split, subset, streaming)
        elif looks_like_path(name) or path.suffix in BUILDERS:
            raise ValueError(f"dataset {name!r}: there is no such file or directory{_near(path)}.")
        else:
            rows = _load_from_hub(name, split, subset, streaming)
    if row_function is not None:
        rows = map_rows(rows, row_function, name)
    check_prompts(rows, name)
    return rows


def looks_like_path(name: str) -> bool:
    """True for what cannot be a hub id: ./x, /x, ~/x, a/b/c."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def has_one_split(name: str) -> bool:
    """True for a file, and for a directory that `Dataset.save_to_disk` wrote: `train`."""
    path = Path(name).expanduser()
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
    from .tasks import load_reasoning_gym

    for key in {"size", "seed"} & config.keys():
        raise ValueError(f"dataset_config sets {key!r}: write dataset_size or seed instead.")
    return load_reasoning_gym(task, size, seed, exclude_prompts=exclude_prompts, **config)


def _load_file(path: Path, split: str, streaming: bool) -> Any:
    from datasets import load_dataset

    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ValueError(f"dataset {str(path)!r}: expected {KINDS}, got a {path.suffix!r} file.")
    if path.stat().st_size == 0:
        raise ValueError(
            f"dataset {str(path)!r} is empty: it needs at least one row with a prompt."
        )
    if split.partition("[")[0] != "train":
        raise ValueError(
            f"dataset {str(path)!r}: a file has one split, 'train', not {split!r}. For evaluation "
            "name another file, as eval_dataset_name."
        )
    options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    try:
        rows: Any = load_dataset(
            builder, data_files=str(path), split=split, streaming=streaming, **options
        )
        if not streaming:
            rows.data.table.validate(full=True)  # else bad UTF-8 shows when its row is read
        return rows
    except Exception as error:
        raise ValueError(_fault(path, error)) from error


def _fault(path: Path, error: Exception) -> str:
    """Where a data file is damaged: for JSON the line, else what the reader says."""
    if "corresponds to no data" in str(error):
        return f"dataset {str(path)!r} is empty: it needs at least one row with a prompt."
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                is_row = not line.strip() or isinstance(json.loads(line), dict)
                reason = 'expected an object such as {"prompt": "..."}'
            except UnicodeDecodeError:
                is_row, reason = False, "not UTF-8 text"
            except json.JSONDecodeError as fault:
                is_row, reason = False, f"not valid JSON: {fault.msg} at column {fault.colno}"
            if not is_row:
                return f"dataset {str(path)!r}, line {number}: {reason}."
    if path.suffix.lower() == ".json":
        try:
            json.loads(path.read_bytes())
        except json.JSONDecodeError as fault:
            where = f"line {fault.lineno}, column {fault.colno}"
            return f"dataset {str(path)!r}, {where}: not valid JSON: {fault.msg}."
        except UnicodeDecodeError:
            return f"dataset {str(path)!r}: not UTF-8 text."
    return f"dataset {str(path)!r}: {_sentence(error)}"


def _load_directory(path: Path, split: str, subset: str | None, streaming: bool) -> Any:
    from datasets import DatasetDict, ReadInstruction, load_dataset, load_from_disk

    try:
        if not any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return load_dataset(str(path), subset, split=split, streaming=streaming)
        saved = load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"dataset {str(path)!r}: {_sentence(error)}") from error
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    wanted = split.partition("[")[0]
    if wanted not in splits:
        none = "was saved without splits, so there is no"
        has = f"has the splits {[*splits]}, not" if splits is saved else none
        raise ValueError(f"dataset {str(path)!r} {has} {wanted!r}.")
    rows = splits[wanted]
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
