"""The files of an evaluation: samples.jsonl, result.json, and tables of several results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.json_text import parse_json
from ..config.paths import user_path
from ..records import PromptText
from ..reports.metrics_file import write_atomically
from .compare import Judgement

# what reading JSON of another form raises
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
HEAD = (
    "| model | against | judge | win rate, % | 95 % interval | decided | ties | no verdict "
    "| first shown won, % | ROUGE-1 / 2 / L |\n| --- | --- | --- |" + " ---: |" * 7
)


def write_samples(
    path: Path,
    prompts: Sequence[PromptText],
    texts: Sequence[str],
    others: Sequence[str],
    made_with: str,
    rows: Sequence[Sequence[Judgement]] = (),
) -> None:
    """One JSON object per prompt; such a file can be given as texts of a later evaluation.

    made_with: a fingerprint of all settings and files that the texts depend on.
    """
    lines = []
    for number, (prompt, text, other) in enumerate(zip(prompts, texts, others, strict=True)):
        sample: dict[str, Any] = {"prompt": prompt, "completion": text, "against": other}
        sample["made_with"] = made_with
        if rows:
            sample["judgements"] = [_as_json(judgement) for judgement in rows[number]]
        lines.append(json.dumps(sample) + "\n")
    write_atomically(path, "".join(lines).encode())


def read_samples(path: Path, made_with: str) -> tuple[list[str], list[str]] | None:
    """(texts, others) of a file of `write_samples`; None if they were not made with the same."""
    try:
        rows = [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if {row["made_with"] for row in rows} != {made_with}:
            return None
        return [row["completion"] for row in rows], [row["against"] for row in rows]
    except (*DAMAGED, OSError):  # another kind of file
        return None


def _as_json(judgement: Judgement) -> dict[str, Any]:
    names = ["against", "completion"] if judgement.place else ["completion", "against"]
    index, why, answer = judgement.verdict
    better = None if index is None else names[index]
    return {"order": names, "better": better, "why": why, "answer": answer}


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """result.json, and the same as a table in result.md."""
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(folder / "result.json", text.encode())
    write_atomically(folder / "result.md", (as_table([result]) + "\n").encode())


def read_result(folder: str) -> dict[str, Any]:
    """result.json of a directory. Raises ValueError if it is not one of ours."""
    path = user_path(folder) / "result.json"
    try:
        result = parse_json(path.read_text(encoding="utf-8"))
        as_row(result)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}.") from error
    except DAMAGED as error:
        raise ValueError(f"{path} was not written by `rloo-fast eval judge`.") from error
    return result


def as_table(results: Sequence[Mapping[str, Any]]) -> str:
    """A line per result, in Markdown."""
    return "\n".join([HEAD, *map(as_row, results)])


def as_row(result: Mapping[str, Any]) -> str:
    settings, figures = result["settings"], result["figures"]
    low, high = _percent(figures["win_rate_low"]), _percent(figures["win_rate_high"])
    rouge = figures["rouge"]
    cells = [
        _name(settings["completions"] or settings["model_name_or_path"]),
        _name(settings["against"]),
        _name(settings["judge"])
        + (f" {_name(settings['judge_model'])}" if settings["judge_model"] else "")
        + (" (both orders)" if settings["both_orders"] else ""),
        _percent(figures["win_rate"]),
        f"{low} – {high}" if figures["num_decided"] else "–",
        str(figures["num_decided"]),
        str(figures["num_ties"]),
        str(figures["num_no_verdict"]),
        _percent(figures["first_won"]),
        " / ".join(f"{100 * value:.1f}" for value in rouge.values()) if rouge else "–",
    ]
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _name(text: str) -> str:
    """The last two parts of a path, as a hub id has."""
    return "/".join(text.rstrip("/").split("/")[-2:]).replace("|", "\\|")
