"""One rank of the table of test_engine_settings: trains, and goes on to the next run after one that
failed.

python -m tests.support.settings_worker OUT_DIR MODELS_DIR CASES_JSON   (under torchrun, or alone)

As engine_worker; a run that raises an error leaves OUT_DIR/<i>.txt: its kind and last words.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch

from tests.support.engine_worker import leave, train


def main(out: Path, models: Path, cases: list[dict]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # every train() begins with a collection, which then spares what was imported
    first = int(os.environ.get("RANK", 0)) == 0
    for i, settings in enumerate(cases):
        try:
            result = train(out / str(i), models, **settings)
        except Exception as error:
            if first:
                said = " ".join(str(error).split())[-100:]  # DeepSpeed's begin with whole tensors
                (out / f"{i}.txt").write_text(f"{type(error).__name__}: ... {said}")
            continue
        if first:
            torch.save(result, out / f"{i}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
