"""One rank of the tests with images and several processes: trains, and saves what it has trained.

python -m tests.support.vision_worker OUT_DIR MODEL_DIR CASES_JSON      (under torchrun, or alone)

CASES_JSON: a list of settings, run i writes OUT_DIR/<i>.pt. Settings are RLOOConfig fields, and
    engine   see cpu_engines.py
    family   of the model in MODEL_DIR, see vision.py
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.records import Rollout
from tests.parity.test_trl import MAX_NEW, first_reward
from tests.support.cpu_engines import engine_fields, whole_state
from tests.support.engine_worker import Injected, leave
from tests.support.tiny import WORDS
from tests.support.vision import make_processor, picture

# neighbours of a step are on two ranks: some steps have images on one of them alone, or on none
NUMBERS = (1, 0, 2, 1, 0, 0)


class InjectedWithImages(Injected):
    takes_images = True

    def _generate_with_images(self, prompt_ids, inputs, sampling, seeds, on_finished) -> Rollout:
        return self._generate(prompt_ids, sampling, seeds, on_finished)


def rows() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": " ".join(WORDS[i : i + 1 + i % 3])}],
                "images": [picture(9 * i + j, 16 + 8 * j) for j in range(NUMBERS[i])],
            }
            for i in range(len(NUMBERS))
        ]
    )


def train(out: Path, model: Path, family: str, engine: str | None = None, **settings) -> dict:
    fields = engine_fields(engine)
    args = RLOOConfig(
        str(out), max_completion_length=MAX_NEW, max_steps=3, learning_rate=0.005, optim="sgd",
        max_grad_norm=20.0, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, shuffle_dataset=False, num_generations=2, logp_diff_stop=0.0,
        **{"gradient_checkpointing": False, **fields, **settings},
    )  # fmt: skip
    trainer = RLOOTrainer(
        str(model / family), first_reward, args, train_dataset=rows(),
        processing_class=make_processor(family),
    )  # fmt: skip
    trainer.rollouts.engine = InjectedWithImages(trainer)
    start = whole_state(trainer)
    trainer.train()
    return {"start": start, "weights": whole_state(trainer), "logs": trainer.state.log_history}


def main(out: Path, model: Path, cases: list[dict]) -> None:
    torch.set_num_threads(1)
    for i, settings in enumerate(cases):
        try:
            result = train(out / str(i), model, **settings)
        except Exception as error:
            error.add_note(f"in the run with {settings}")
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(result, out / f"{i}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
