"""One rank of test_train_vllm_ranks: runs with vLLM in the training processes, under torchrun.

python -m tests.support.vllm_worker OUT_DIR MODEL_DIR SETTINGS_JSON

SETTINGS_JSON: {case: RLOOConfig fields}; "engine" (see cpu_engines.py) and "lora" beside them. Each
writes the log history and what each rank sampled to OUT_DIR/CASE.
"""

import json
import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig

from rloo_fast import RLOOConfig, RLOOTrainer
from tests.end_to_end.test_train_vllm import ENGINE, PROMPTS, share_of_w3
from tests.support.cpu_engines import engine_fields
from tests.support.tiny import make_tokenizer


def train(out: Path, model_dir: str, settings: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    fields = engine_fields(settings.pop("engine", None))
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if settings.pop("lora", 0) else None
    args = RLOOConfig(
        output_dir=str(out), num_generations=4, max_completion_length=8, max_steps=3,
        learning_rate=0.02, beta=0.01, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, shuffle_dataset=False, gradient_checkpointing=False,
        use_vllm=True, vllm_enable_sleep_mode=True, vllm_engine_kwargs=ENGINE, **fields, **settings,
    )  # fmt: skip
    trainer = RLOOTrainer(
        model_dir, share_of_w3, args, PROMPTS, processing_class=make_tokenizer(), peft_config=lora
    )
    sampled, generate = [], trainer.rollouts.engine.generate

    def recorded(*args, **kwargs):
        rollout = generate(*args, **kwargs)
        sampled.append(rollout.completion_ids)
        return rollout

    trainer.rollouts.engine.generate = recorded
    trainer.train()
    rank = trainer.accelerator.process_index
    (out / f"sampled-{rank}.json").write_text(json.dumps(sampled))
    if rank == 0:
        (out / "logs.json").write_text(json.dumps(trainer.state.log_history))
    trainer.rollouts.close()


def main(out: Path, model_dir: str, cases: dict) -> None:
    for case, settings in cases.items():
        train(out / case, model_dir, settings)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo of torch 2.13 sometimes aborts in its destructor, after correct results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
