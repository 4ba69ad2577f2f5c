"""One rank of a run that keeps its completions (tests/reports/test_view_run.py).

python -m tests.support.view_worker OUT_DIR   (under torchrun, or alone)
"""

import os
import sys

import torch
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from tests.support.engine_worker import leave
from tests.support.tiny import make_model, make_tokenizer


def main(out: str) -> None:
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    args = RLOOConfig(
        out, per_device_train_batch_size=16 // world, num_generations=4, max_completion_length=6,
        max_steps=2, learning_rate=1e-2, beta=0.1, view_mib=1, logging_steps=1, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(16)]})

    def reward(completion_ids, **_):
        return [sum(ids) / 100 for ids in completion_ids]

    RLOOTrainer(make_model(), reward, args, data, processing_class=make_tokenizer()).train()
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
