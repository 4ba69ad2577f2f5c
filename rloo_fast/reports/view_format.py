"""Names in _view/: its files, and what stands in them (docs/looking.md). Needs no torch.

A name that begins with an underscore is not uploaded by push_to_hub: prompts may be private.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

FOLDER, RUN = "_view", "run.json"
SUMMARY = b"rloo_fast"  # key of a step's metadata, which is JSON
FORMAT = 1
OF_TOKENS = ("logp", "entropy", "kl", "sampler_diff")  # columns token/<name>, beside token/text
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # of rewards and lengths, in a summary
_NAME = re.compile(r"step-(\d{8,})\.parquet")


def step_file(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:08d}.parquet"


def step_files(run_dir: Path) -> dict[int, Path]:
    """step -> file of the steps that are kept, in order; none where a run keeps none."""
    found = (run_dir / FOLDER).glob("step-*.parquet")
    steps = {int(match[1]): path for path in found if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(steps.items()))


def prompt_id(text: str) -> str:
    """Names a prompt over steps and runs."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
