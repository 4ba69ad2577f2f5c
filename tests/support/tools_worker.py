"""One rank of the tests of tools with several processes.

python -m tests.support.tools_worker OUT_DIR      (as under torchrun)

OUT_DIR/<processes>.json: {case: facts}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.rollout.trajectories.test_runs import make_trainer
from tests.support.cpu_engines import engine_fields

ROWS = 8
CASES: dict[str, dict[str, Any]] = {
    "groups whole": {"num_generations": 4},
    "groups on both": {"num_generations": 8, "template": "QwQ, opened and dropped"},
    "sharded weights": {"num_generations": 4, "engine": "fsdp2"},
}
METRICS = (
    "loss", "reward", "completions/mean_length", "tools/call_frequency", "tools/turns", "kl",
    "entropy", "sampling/logp_diff_max",
)  # fmt: skip


def facts(directory: Path, world: int, case: dict[str, Any]) -> dict[str, Any]:
    case = {**case}
    engine = case.pop("engine", None)
    trainer = make_trainer(
        directory,
        per_device_train_batch_size=ROWS // world,
        learning_rate=1e-3,
        **engine_fields(engine if world > 1 else None),
        **case,
    )
    rounds = 0
    generate = trainer.rollouts.generate

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal rounds
        rounds += 1
        return generate(*args, **kwargs)

    trainer.rollouts.generate = counted
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {"rounds": rounds, "logs": [{name: log[name] for name in METRICS} for log in logs]}


def main() -> None:
    directory, world = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
    found = {name: facts(directory / name, world, case) for name, case in CASES.items()}
    rank = os.environ.get("RANK", "0")
    (directory / f"{world}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
