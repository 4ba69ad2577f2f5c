"""One rank of tests/step/test_ahead_ranks.py: runs that sample ahead, on two processes.

python -m tests.support.ahead_worker OUT_DIR
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from rloo_fast.step import build, loaders
from tests.step.test_ahead import ROWS, STEPS, ahead
from tests.step.test_ahead_dynamic import MANY, odd_or_even
from tests.support.kill_ahead import slow_reward
from tests.support.kill_resume import make_trainer

CASES: dict[str, dict[str, Any]] = {
    "loader": {"by_the_queue": False},
    "bound 0": {"by_the_queue": True},
    "bound 2": {"max_staleness": 2},
    "replaced": {"max_staleness": 2, "dynamic_sampling": True, "train_dataset": MANY},
}


def train(out: Path, settings: dict[str, Any]) -> None:
    settings = {"train_dataset": ROWS, "max_steps": STEPS // 2, "save_strategy": "no", **settings}
    modules: tuple[Any, ...] = (build, loaders)
    if "by_the_queue" in settings:
        by_the_queue = settings.pop("by_the_queue")
        for module in modules:
            module.samples_ahead = lambda args: by_the_queue
        trainer: Any = make_trainer(out, slow_reward, **settings)
    else:
        for module in modules:
            module.samples_ahead = lambda args: args.max_staleness > 0
        trainer = ahead(
            out, reward=odd_or_even if "dynamic_sampling" in settings else slow_reward, **settings
        )
    collect, trained = trainer.source.next, []

    def noted(*args: Any) -> Any:
        collected = collect(*args)
        batch = collected.batch
        lag = int(batch.staleness.max()) if batch.staleness.numel() else 0
        trained.append([batch.prompt_ids, batch.completion_ids, batch.rows.reward.tolist(), lag])
        return collected

    trainer.source.next = noted
    trainer.train()
    rank = trainer.accelerator.process_index
    weights = {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()}
    found = {"trained": trained, "head": weights["lm_head.weight"]}
    (out / f"{rank}.json").write_text(json.dumps(found))


def main(out: Path) -> None:
    for case, settings in CASES.items():
        train(out / case, settings)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo of torch 2.13 sometimes aborts in its destructor, after correct results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
