"""One rank of test_train_failures: something goes wrong on the last rank in the second step.

python -m tests.support.failure_worker OUT_DIR MODELS_DIR RUN [RUN ...]      (under torchrun)

RUN: failure-engine or failure-engine-lora; failure: nan | reward | forward | out_of_memory. Writes
OUT_DIR/<rank>.json: {RUN: what became of it}; complete or absent: torchrun ends a process that
is still writing when another has failed. What a run raises is written down; what the last raises
ends the process.
"""

import gc
import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from rloo_fast.models.adapters import base_causal_lm
from tests.parity.test_trl import first_reward
from tests.support.cpu_engines import whole_state
from tests.support.engine_worker import leave, make_trainer

PLANTED = "planted on the last rank"
SETTINGS = {
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_tokens_per_micro_batch": 30,
    "optim": "adamw_torch",
}


class Digests(TrainerCallback):
    """One of all weights after every step; and whether they are finite."""

    def __init__(self, trainer):
        self.trainer, self.weights, self.finite = trainer, [], True

    def on_step_end(self, args, state, control, **kwargs):
        digest = hashlib.sha256()
        for weight in whole_state(self.trainer).values():
            digest.update(weight.numpy().tobytes())
            self.finite &= bool(weight.isfinite().all())
        self.weights.append(digest.hexdigest())


def is_the_moment(trainer) -> bool:
    return trainer.state.global_step == 1 and trainer.accelerator.is_last_process


def plant(failure: str, trainer) -> None:
    """`reward` is planted in the reward function."""

    def nan(module, args, output):
        if is_the_moment(trainer) and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    def forward(module, args, output):
        if is_the_moment(trainer):
            raise ArithmeticError(PLANTED)

    def out_of_memory(module, args, output):
        if is_the_moment(trainer):
            raise torch.OutOfMemoryError(f"CUDA out of memory, {PLANTED}.")

    hooks = {"nan": nan, "forward": forward, "out_of_memory": out_of_memory}
    if failure in hooks:
        base_causal_lm(trainer.model).model.norm.register_forward_hook(hooks[failure])


def run(out_dir: Path, models: Path, failure: str, engine: str, lora: bool) -> dict:
    def reward(completion_ids, **columns):
        if failure == "reward" and is_the_moment(trainer):
            raise ArithmeticError(PLANTED)
        return first_reward(completion_ids)

    trainer = make_trainer(out_dir, models, engine=engine, lora=lora, reward=reward, **SETTINGS)
    plant(failure, trainer)
    digests = Digests(trainer)
    trainer.add_callback(digests)
    trainer.train()
    return {
        "weights": digests.weights,
        "finite": digests.finite,
        "num_skipped": trainer.nonfinite.num_skipped,
    }


def main(out: Path, models: Path, runs: list[str]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # every train() begins with a collection, which then spares what was imported
    found = {}
    for name in runs:
        failure, engine, *lora = name.split("-")
        try:
            found[name] = run(out / name, models, failure, engine, bool(lora))
        except Exception as error:
            notes = getattr(error, "__notes__", [])
            found[name] = {"error": type(error).__name__, "text": str(error), "notes": notes}
            if name == runs[-1]:
                raise
        finally:
            rank = os.environ["RANK"]
            (out / f"{rank}.part").write_text(json.dumps(found))
            (out / f"{rank}.part").rename(out / f"{rank}.json")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
