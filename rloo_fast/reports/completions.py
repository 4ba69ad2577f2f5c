"""Samples of a run as a table: on the terminal, and for wandb, trackio and TensorBoard."""

import importlib
import math
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..masking import masked_known
from .columns import MARKS, RESERVED_COLUMNS, TEXTS
from .metrics_file import as_scalar
from .progress import bars_set_aside

MAX_CELL_CHARS = 1000  # a longer text is printed as its two ends
PIPE_WIDTH = 120  # characters per line where there is no terminal to ask (CI, a log file)
MIN_TEXT_WIDTH = 40  # of the columns prompt and completion together
IMAGES = "image"  # a column for trackers alone: a list of images for each prompt
CONTROL_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {0x7F: 0x2421}
# escape sequences of one character, and what turns the order of those around it
OBEYED = [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
CONTROL_PICTURES |= dict.fromkeys(OBEYED, 0xFFFD)
# as entities, so that TensorBoard's Markdown shows what a model wrote, and obeys none of it
MARKDOWN = {ord(c): f"&#{ord(c)};" for c in "&<>|*_`[]\\#~$!"} | {ord("\n"): "<br>"}


def message_text(entry: Any) -> str:
    """One prompt or completion as text: a string as it is, messages as `role: text` lines."""
    if not (isinstance(entry, list) and entry and all(isinstance(m, dict) for m in entry)):
        return entry if isinstance(entry, str) else str(entry)
    return "\n".join(f"{m.get('role', '?')}: {_content_text(m)}" for m in entry)


def _content_text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if not isinstance(content, str):  # a list of typed blocks
        content = "".join(
            b["text"] if b.get("type") == "text" else f"[{b['type']}]" for b in content
        )
    parts = [f"({message['reasoning_content']})"] if message.get("reasoning_content") else []
    parts += [content] if content else []
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        parts.append(f"{function.get('name', '?')}({function.get('arguments', '')})")
    return "\n".join(parts)


def completions_dataframe(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    rewards: Mapping[str, Sequence[float | None]],
    advantages: Sequence[float | None],
    step: int,
    extra: Mapping[str, Sequence[Any]] | None = None,
) -> pd.DataFrame:
    """One row per completion: step, prompt, completion, one column per reward, extra…, advantage.

    Messages become `role: text`; a reward of None becomes NaN. A name that is taken is put behind
    "reward/" or "extra/". ValueError for columns of different lengths.
    """
    rewards = _without_taken(rewards, RESERVED_COLUMNS, "reward")
    extra = _without_taken(extra or {}, [*RESERVED_COLUMNS, *rewards], "extra")
    columns = {
        "prompt": [message_text(p) for p in prompts],
        "completion": [message_text(c) for c in completions],
        **rewards,
        **extra,
        "advantage": advantages,
    }
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Expected one value per completion in every column, got {lengths}.")
    frame = pd.DataFrame({name: _table_column(column) for name, column in columns.items()})
    frame.insert(0, "step", step)
    return frame


def _without_taken(
    columns: Mapping[str, Sequence[Any]], taken: Sequence[str], kind: str
) -> dict[str, Sequence[Any]]:
    return {f"{kind}/{name}" if name in taken else name: v for name, v in columns.items()}


def mark(frame: pd.DataFrame, mode: str, sampled_after_step: int, num_rows: int) -> pd.DataFrame:
    """The rows with what they are samples of, as `MARKS`; `row`: their number, the frame's index.

    mode: train, or the prefix of the evaluation's metrics. sampled_after_step: optimizer steps
    done when they were sampled. num_rows: completions that were sampled together.
    """
    rest = [name for name in frame.columns if name != "step"]
    marks = {"mode": mode, "sampled_after_step": sampled_after_step, "row": frame.index}
    return frame.assign(**marks, num_rows=num_rows).reindex(columns=[*MARKS, *rest])


def _table_column(values: Sequence[Any]) -> pd.Series:
    """float64 where all values are numbers or None, else text: trackers refuse mixed columns."""
    values = [as_scalar(value) for value in values]
    if all(value is None or isinstance(value, int | float) for value in values):
        return pd.Series(values, dtype="float64")
    texts = [None if v is None else masked_known(message_text(v)) for v in values]
    return pd.Series(texts, dtype="object")


def draw_rows(frame: pd.DataFrame, num_samples: int | None, seed: int = 0) -> pd.DataFrame:
    """`num_samples` rows of a table, drawn with (seed, step), in their order; None: all of them.

    No global random state is used. ValueError for a number below 1.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be >= 1, or None for all, got {num_samples}.")
    if num_samples is None or num_samples >= len(frame):
        return frame
    rows = random.Random(f"{seed},{frame['step'].iloc[0]}").sample(range(len(frame)), num_samples)
    return frame.iloc[sorted(rows)]


def without_images(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows as text and numbers."""
    held = IMAGES in frame and isinstance(frame[IMAGES].iloc[0], list)
    return frame.drop(columns=IMAGES) if held else frame


def print_table(frame: pd.DataFrame, total: int, title: str = "", note: str = "") -> None:
    """Print rows of `completions_dataframe`, of `total` in all, as a panel on stdout.

    title: in place of the step. note: after the number of rows.
    Texts are folded: the table is as wide as the terminal (COLUMNS or `PIPE_WIDTH` without one), or
    wider where its columns would leave a text less than `MIN_TEXT_WIDTH`. A text beyond
    `MAX_CELL_CHARS` says how much of its middle is left out. None and NaN are "–".
    """
    title = title or f"Step {frame['step'].iloc[0]}"
    frame = frame.drop(columns=[*MARKS], errors="ignore")
    console = Console()
    has_width = console.is_terminal or "COLUMNS" in os.environ
    widths = _column_widths(list(frame.columns), console.width if has_width else PIPE_WIDTH)
    borders = 5 + 3 * len(widths)
    console = Console(width=borders + sum(widths.values()))
    table = Table(show_lines=True, header_style="bold")
    for name, width in widths.items():
        justify = "right" if frame[name].dtype == "float64" else "left"
        header = _cell(_header(name), console)
        table.add_column(header, width=width, justify=justify, overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(_cell(value, console) for value in row))
    shown = f"{len(frame)} of {total} completions{note}"
    with bars_set_aside():
        console.print(Panel(table, title=title, subtitle=shown))


def _header(name: str) -> str:
    return name.capitalize() if name in RESERVED_COLUMNS else name


def _column_widths(names: list[str], console_width: int) -> dict[str, int]:
    """Prompt and completion share, 2 : 3, what the other columns leave; set here, since rich would
    shrink those two to a letter per line before any number."""
    room = console_width - 5 - 3 * len(names)
    widths, rest = {}, 0
    for widest in (16, 9, 7):  # 7: -12.345
        widths = {name: min(max(len(name), 7), widest) for name in names}
        rest = room - sum(width for name, width in widths.items() if name not in TEXTS)
        if rest >= MIN_TEXT_WIDTH:
            break
    rest = max(rest, MIN_TEXT_WIDTH)
    return widths | {"prompt": rest * 2 // 5, "completion": rest - rest * 2 // 5}


def _cell(value: Any, console: Console) -> Text:
    """Text as it may be printed: no markup, no escape sequences, nothing stdout cannot encode."""
    encoding = console.encoding
    return Text(_cell_text(value).encode(encoding, "backslashreplace").decode(encoding))


def _cell_text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if not isinstance(value, str):
        return f"{value:.3f}"
    text = value.translate(CONTROL_PICTURES)
    if (left_out := len(text) - MAX_CELL_CHARS) > 0:
        half = MAX_CELL_CHARS // 2
        text = f"{text[:half]} […{left_out} characters left out…] {text[-half:]}"
    return text


def markdown_table(frame: pd.DataFrame) -> str:
    """The rows of `completions_dataframe` as Markdown, texts shortened as on the terminal."""
    frame = frame.drop(columns=[*MARKS], errors="ignore")
    right = [frame[name].dtype == "float64" for name in frame.columns]
    rows = [[_header(name) for name in frame.columns], *frame.itertuples(index=False)]
    lines = [
        "| " + " | ".join(_cell_text(value).translate(MARKDOWN) for value in row) + " |"
        for row in rows
    ]
    return "\n".join(
        [lines[0], "|" + "|".join("---:" if r else "---" for r in right) + "|", *lines[1:]]
    )


def log_completions_table(
    report_to: Sequence[str], frame: pd.DataFrame, name: str = "completions"
) -> None:
    """Send `frame` as the table `name` to wandb and trackio, where chosen and a run is on."""
    if frame.empty:
        return
    for package in ("wandb", "trackio"):
        tracker = _active_tracker(package) if package in report_to else None
        if tracker is not None:
            # the x axis that transformers' callbacks log against
            step = int(frame["step"].iloc[-1])
            shown = frame
            if IMAGES in frame and isinstance(frame[IMAGES].iloc[0], list):
                columns = {IMAGES: [[tracker.Image(x) for x in row] for row in frame[IMAGES]]}
                shown = frame.assign(**columns)
            table = tracker.Table(dataframe=shown)
            tracker.log({name: table, "train/global_step": step})


def _active_tracker(name: str) -> Any | None:
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    # getattr: a run directory called wandb/ imports as an empty namespace package
    if name == "wandb":
        return module if getattr(module, "run", None) is not None else None
    context = getattr(module, "context_vars", None)
    return module if context is not None and context.current_run.get() is not None else None
