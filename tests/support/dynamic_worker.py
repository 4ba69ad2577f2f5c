"""One rank of the tests of dynamic sampling with several processes.

python -m tests.support.dynamic_worker OUT_DIR CASES_JSON      (as under torchrun)

CASES_JSON: {name: [K, completions of a batch]}. OUT_DIR/<processes>.json: {name: facts}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.kill_resume import make_trainer, metrics_of

STEPS, SAVED = 4, 2


def parity(completions: list[str], **_: Any) -> list[float]:
    """Of the text, so that it is the same wherever a completion is scored; most are wrong."""
    return [float(sum(map(ord, text)) % 7 == 0) for text in completions]


def run(directory: Path, k: int, rows: int) -> Any:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = make_trainer(
        directory,
        parity,
        dynamic_sampling=True,
        curriculum=0.5,
        num_generations=k,
        per_device_train_batch_size=rows // world,
        max_steps=STEPS,
        save_steps=SAVED,
        learning_rate=1e-4,
        log_completions_csv=True,
    )
    trained: list[Any] = []
    add = trainer.buffer.add

    def noted(batch: Any) -> None:
        generation = batch.generation
        mine = list(zip(generation.rows.row.tolist(), generation.completion_ids, strict=True))
        parts: list[Any] = [mine]
        if world > 1:
            parts = [None] * world
            dist.all_gather_object(parts, mine)
        trained.append([ids for _, ids in sorted(pair for part in parts for pair in part)])
        add(batch)

    trainer.buffer.add = noted
    return trainer, trained


def facts(directory: Path, k: int, rows: int) -> dict[str, Any]:
    trainer, trained = run(directory / "whole", k, rows)
    trainer.train()
    stream: Any = trainer.source.stream  # pyright: ignore
    found = {
        "trained": trained,
        "fates": stream.ledger.state_dict()["fates"].tolist(),
        "weights": sum(float(p.detach().double().abs().sum()) for p in trainer.model.parameters()),
        "metrics": [
            {name: value for name, value in row.items() if name.startswith("dynamic/")}
            for row in metrics_of(directory / "whole")
        ],
    }
    second, rest = run(directory / "resumed", k, rows)
    second.train(resume_from_checkpoint=str(directory / f"whole/checkpoint-{SAVED}"))
    weights = zip(trainer.model.parameters(), second.model.parameters(), strict=True)
    found["resumed"] = [
        rest == trained[SAVED:],
        all(torch.equal(one, other) for one, other in weights),
        second.source.state_dict()["stream"]["places"] == stream.state_dict()["places"],
    ]
    return found


def main(out: Path, cases: dict[str, list[int]]) -> None:
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    found = {name: facts(out / f"{world} {name}", *case) for name, case in cases.items()}
    if int(os.environ.get("RANK", "0")) == 0:
        (out / f"{world}.json").write_text(json.dumps(found))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo of torch 2.13 sometimes aborts in its destructor, after correct results


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
