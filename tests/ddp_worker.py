"""One rank of test_train_ddp: trains on injected completions, saves weights and logs, exits.

python tests/ddp_worker.py OUT_DIR MODEL_DIR SETTINGS_JSON      (under torchrun, or alone)

SETTINGS_JSON: {case: RLOOConfig fields}, one run after another; case i writes to OUT_DIR/<i>.
"""

import json
import os
import sys
from pathlib import Path

import torch
from conftest import InjectedEngine, make_tokenizer
from datasets import Dataset
from test_trl_parity import MAX_NEW, completion, first_reward

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.types import Rollout


class Injected(InjectedEngine):
    """Completions that follow from the prompt and the row's place among those of all ranks."""

    def __init__(self, trainer, num_generations):
        super().__init__()
        self.trainer, self.num_generations, self.calls = trainer, num_generations, 0

    def _generate(self, prompt_ids, sampling, seeds, on_finished):
        self.calls += 1
        first = self.trainer.accelerator.process_index * len(prompt_ids)
        ids = [
            completion(p, (first + i) % self.num_generations, self.calls)
            for i, p in enumerate(prompt_ids)
        ]
        logps = [[-2.65 - (x * 5 + t * 3) % 7 / 4 for t, x in enumerate(row)] for row in ids]
        return Rollout(ids, ["stop" if i[-1] == 1 else "length" for i in ids], logps)


def zero_for_short_prompts(prompts, completion_ids, **kwargs):
    rewards = first_reward(completion_ids)
    return [0.0 if len(p.split()) < 3 else r for p, r in zip(prompts, rewards, strict=True)]


def plant_out_of_memory(trainer) -> None:
    """The first training forward on the last rank fails, which is of its largest micro-batch."""
    calls = []

    def fail_once(*_):
        if torch.is_grad_enabled() and trainer.accelerator.is_last_process:
            calls.append(1)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer.model.get_input_embeddings().register_forward_hook(fail_once)


def train(out_dir: Path, model_dir: str, settings: dict) -> None:
    settings = dict(settings)
    reward = globals()[settings.pop("reward", "first_reward")]
    out_of_memory = settings.pop("out_of_memory", False)
    args = RLOOConfig(
        output_dir=str(out_dir),
        max_completion_length=MAX_NEW,
        max_steps=3,
        learning_rate=0.01,
        optim="sgd",
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        logp_diff_stop=0.0,  # the log-probs of the injected completions are made up, too
        **settings,
    )
    dataset = Dataset.from_dict(
        {"prompt": [" ".join(f"w{(i * 7 + j) % 26}" for j in range(1 + i % 5)) for i in range(40)]}
    )
    trainer = RLOOTrainer(
        model_dir,
        reward,
        args,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(5)),
        processing_class=make_tokenizer(),
    )
    injected = Injected(trainer, args.num_generations)
    trainer.rollouts.engine = injected
    if out_of_memory:
        plant_out_of_memory(trainer)
    trainer.train()
    trainer.evaluate()
    assert trainer.planner.num_halvings == int(out_of_memory)
    if trainer.accelerator.is_main_process:
        torch.save(trainer.model.state_dict(), out_dir / "weights.pt")
        (out_dir / "logs.json").write_text(json.dumps(trainer.state.log_history))


def main(out: str, model_dir: str, cases: dict) -> None:
    torch.set_num_threads(1)
    for i, settings in enumerate(cases.values()):
        train(Path(out) / str(i), model_dir, settings)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo of torch 2.13 sometimes aborts in its destructor, after correct results


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
