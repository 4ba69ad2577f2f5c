"""The options of `rloo-fast eval judge`, and their checks before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .registry import CHOICES, judge_kind, refused_options
from .texts import is_file

REFERENCE = "reference"  # `against`: the dataset's own texts


def _field(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class JudgeArguments:
    """One evaluation."""

    model_name_or_path: str | None = _field(
        None, "The model: a directory, adapters too, or hub id."
    )
    completions: str | None = _field(None, "In its place: a .jsonl of `prompt` and `completion`.")
    dataset_name: str | None = _field(None, "Prompts: a file, directory or hub id.")
    dataset_subset: str | None = _field(None, "Configuration of a hub dataset.")
    dataset_test_split: str | None = _field(None, "Default: validation, or train of a single file.")
    dataset_map: str | None = _field(None, "Row function, as in training; it makes both columns.")
    reference_column: str = _field("completion", "Column of the dataset with the references.")
    against: str = _field(REFERENCE, "What to compare with: reference, another model, a .jsonl.")
    num_prompts: int = _field(1000, "The first so many prompts; -1: all.")
    max_new_tokens: int = _field(200, "Longest text of a model.")
    temperature: float = _field(0.0, "0: the likeliest token each time.")
    batch_size: int = _field(16, "Prompts, or texts for a reward model, at a time.")
    dtype: str = _field(
        "auto", "Type of weights; auto: the saved one.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )  # fmt: skip
    trust_remote_code: bool = _field(False, "Allow models that ship their own code.")
    use_vllm: bool = _field(False, "Generate with vLLM.")
    judge: str | None = _field(None, f"{CHOICES}.")
    judge_model: str | None = _field(None, "The server's name of the model, or the reward model.")
    judge_label: int | str | None = _field(
        None, "Of a reward model with several labels: the number or name of the one that counts."
    )
    judge_position: str = _field(
        "last",
        "Where a reward model reads: the last token, or an EOS put there.",
        choices=("last", "eos"),
    )
    judge_base_url: str | None = _field(None, "As http://localhost:8000/v1; key: OPENAI_API_KEY.")
    judge_prompt: str | None = _field(None, "File: a question with {prompt}, {text0}, {text1}.")
    judge_marker: str | None = _field(None, "The verdict is what follows this in an answer.")
    judge_kwargs: dict | str | None = _field(None, 'JSON for requests, as {"max_tokens": 5}.')
    judge_concurrency: int = _field(8, "Questions under way at a time.")
    judge_timeout_s: float = _field(
        120.0, "Longest to wait for a whole answer, from the first to the last byte."
    )
    judge_retries: int = _field(6, "Times a busy or failing server is asked again.")
    both_orders: bool = _field(
        False, "Ask for each pair in both orders; half a win if they differ."
    )
    seed: int = _field(0, "Of the order, and of texts that are drawn.")
    output_dir: str | None = _field(None, "For the result, and what a next try goes on from.")
    table: list[str] | None = _field(None, "Print the results of these directories; nothing else.")


def check(a: JudgeArguments) -> None:
    """Raise ValueError for every mistake that shows without loading anything."""
    missing = [name for name in ("dataset_name", "judge", "output_dir") if not getattr(a, name)]
    if missing:
        raise ValueError(f"missing: {', '.join(f'--{name}' for name in missing)}.")
    if bool(a.model_name_or_path) == bool(a.completions):
        raise ValueError("one of --model_name_or_path and --completions is needed, and only one.")
    if a.completions and not is_file(a.completions):
        raise ValueError(f"--completions is a .jsonl file, got {a.completions}.")
    kind = judge_kind(a.judge or "")
    for name in kind.needs:
        if not getattr(a, name):
            raise ValueError(f"--judge {a.judge} needs --{name}.")
    for name in refused_options(kind):
        if getattr(a, name) is not None:
            raise ValueError(f"--{name} is not read by --judge {a.judge}: leave it out.")
    least = {"max_new_tokens": 1, "batch_size": 1, "judge_concurrency": 1, "judge_retries": 0}
    for name, value in least.items():
        if getattr(a, name) < value:
            raise ValueError(f"--{name} must be >= {value}, got {getattr(a, name)}.")
    if a.num_prompts != -1 and a.num_prompts < 1:
        raise ValueError(f"--num_prompts must be >= 1, or -1 for all, got {a.num_prompts}.")
    if not (0 <= a.temperature < math.inf and 0 < a.judge_timeout_s < math.inf):
        raise ValueError("--temperature must be >= 0, and --judge_timeout_s > 0; both finite.")
    if (Path(str(a.output_dir)) / "result.json").exists():
        raise ValueError(f"{a.output_dir} holds a result already: give another --output_dir.")
