"""The completions that a run shows: the newest of training, and those of an evaluation."""

from __future__ import annotations

import pandas as pd

from ..records import CompletionTexts
from .completions import IMAGES, completions_dataframe, mark


class Samples:
    """Keeps texts until they are shown: of training the newest generation batch, of an evaluation
    all of its batches. `unique_prompts`: a table has one completion per prompt."""

    def __init__(self, unique_prompts: bool):
        self.unique_prompts = unique_prompts
        self._batches: dict[str, list[CompletionTexts]] = {"train": [], "eval": []}
        self._advantages: dict[str, list[list[float]]] = {"train": [], "eval": []}
        self._sampled_after = {"train": 0, "eval": 0}
        self._is_new = {"train": False, "eval": False}

    def add(self, mode: str, texts: CompletionTexts, step: int) -> None:
        """Texts that were sampled after `step` optimizer steps."""
        if mode == "train" or not self._is_new[mode] or step != self._sampled_after[mode]:
            self._batches[mode].clear()
            self._advantages[mode].clear()
        self._batches[mode].append(texts)
        self._sampled_after[mode], self._is_new[mode] = step, True

    def add_advantages(self, mode: str, advantages: list[float]) -> None:
        """Of the texts that came before; an evaluation's repeats, which come last, have none."""
        if self._batches[mode]:
            self._advantages[mode] = [*self._advantages[mode], advantages]
            del self._advantages[mode][: -len(self._batches[mode])]

    def table(self, label: str, step: int) -> pd.DataFrame | None:
        """Of the log at `step`, marked with `label`: train, or an evaluation's name; None: there
        are none."""
        mode = "train" if label == "train" else "eval"
        # advantages are known last: without them a batch is not yet to be shown
        pairs = zip(self._batches[mode], self._advantages[mode], strict=False)
        if not (frames := [_frame(texts, advantages, step) for texts, advantages in pairs]):
            return None
        frame = pd.concat(frames, ignore_index=True)
        others = [name for name in frame.columns if name != "advantage"]
        frame = frame.reindex(columns=[*others, "advantage"])
        num_rows = len(frame)
        if self.unique_prompts:
            frame = frame.drop_duplicates("prompt")
        return mark(frame, label, self._sampled_after[mode], num_rows)

    def take(self, label: str, step: int) -> pd.DataFrame | None:
        """`table`, once: None for texts that were taken before. An evaluation's are dropped."""
        mode = "train" if label == "train" else "eval"
        frame = self.table(label, step) if self._is_new[mode] else None
        self._is_new[mode] = False
        if mode == "eval":
            self._batches[mode].clear()
            self._advantages[mode].clear()
        return frame


def _frame(texts: CompletionTexts, advantages: list[float], step: int) -> pd.DataFrame:
    real = slice(len(advantages))
    frame = completions_dataframe(
        texts.prompts[real],
        texts.completions[real],
        {name: values[real] for name, values in texts.rewards.items()},
        advantages,
        step,
        {name: values[real] for name, values in texts.extra.items()},
    )
    if texts.images is not None:
        frame = frame.rename(columns={IMAGES: f"extra/{IMAGES}"})
        frame[IMAGES] = pd.Series(texts.images[real], dtype="object")
    return frame


def heading(table: pd.DataFrame) -> tuple[int, str, str]:
    """(completions, title, note) of a whole marked table, for `print_table`."""
    step, label, sampled_after, _, num_rows = table.iloc[0, :5]
    if label != "train":
        name = label.removeprefix("eval").strip("_")
        return num_rows, f"Evaluation{name and f' of {name}'} after step {step}", ""
    is_older = sampled_after != step - 1
    return num_rows, f"Step {step}", f", sampled after step {sampled_after}" if is_older else ""
