"""`rloo-fast eval reward`: the mean rewards of a model's completions, as the trainer evaluates."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from ..data.sources import has_one_split
from .arguments import as_usage_errors, build
from .options import UsageError
from .train import prepare

TRAINS_NOTHING = {"beta": 0.0, "max_steps": 1, "eval_on_start": True, "save_strategy": "no"}
DEFAULTS = {
    "num_generations_eval": 1, "report_to": "none", "log_completions": False, "view_mib": 0,
}  # fmt: skip

SHOWN = ("eval_reward", "eval_completions/mean_length", "eval_completions/clipped_ratio")


def run(given: Mapping[str, Any]) -> int:
    """One completion of each row (num_generations_eval), scored; prints a line per figure."""
    values = {**DEFAULTS, **given, **TRAINS_NOTHING}
    name = values.get("dataset_name")
    if name and not values.get("dataset_test_split") and has_one_split(name):
        values["dataset_test_split"] = "train"
    with tempfile.TemporaryDirectory() as folder:
        script, config = build({"output_dir": folder, **values})
        if config.world_size > 1:
            raise UsageError("eval reward runs in one process: start it without a launcher.")
        trainer: Any = prepare(script, config)
        with as_usage_errors(ValueError):
            try:
                figures = trainer.evaluate()
            finally:
                trainer.rewards.close()
        trainer.end()
    num = config.num_generations_eval
    print(f"{len(trainer.eval_dataset)} prompts of {name}, {num} completion(s) of each")
    for key, value in figures.items():
        if key in SHOWN or key.startswith("eval_rewards/"):
            print(f"{key.removeprefix('eval_'):32} {value:.4g}")
    return 0
