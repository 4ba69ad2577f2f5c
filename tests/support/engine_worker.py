"""One rank of the tests with several processes: trains, and saves what it has trained and logged.

python -m tests.support.engine_worker OUT_DIR MODELS_DIR CASES_JSON      (under torchrun, or alone)

CASES_JSON: a list of settings, one run after another; run i writes OUT_DIR/<i>.pt (see `result`).
Settings are RLOOConfig fields, and
    engine, more   see cpu_engines.py
    model          directory in MODELS_DIR
    lora           True: new adapters; "passed in": a PeftModel with adapters
    reward         a function of this file, by name
    sample         True: completions by the policy itself, not injected ones
    out_of_memory  True: once, on the last rank
    evaluate       False: not after the training
    room           True: before every rollout all that can move is moved to the host
    system         True: all prompts begin with the same words, and some with an example more
    stale          True: of injected completions, older weights sampled some, and a part of others
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PrinterCallback

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.records import Rollout
from tests.parity.test_trl import MAX_NEW, completion, first_reward
from tests.support.cpu_engines import ENGINES, engine_fields, whole_state
from tests.support.live_tensors import TightRoom, live_storages
from tests.support.tiny import InjectedEngine, make_tokenizer

PROMPTS = [" ".join(f"w{(i * 7 + j) % 26}" for j in range(1 + i % 5)) for i in range(40)]
DATASET = Dataset.from_dict({"prompt": PROMPTS})
SYSTEM, EXAMPLE = (" ".join(f"w{(i * 5 + n) % 26}" for i in range(n)) for n in (11, 6))
WITH_SYSTEM = Dataset.from_dict(
    {"prompt": [f"{SYSTEM} {EXAMPLE if i % 3 else ''} {p}" for i, p in enumerate(PROMPTS)]}
)
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


class Injected(InjectedEngine):
    """Completions that follow from the prompt and the row's place among those of all ranks."""

    def __init__(self, trainer, stale=False):
        super().__init__()
        self.trainer, self.stale, self.calls = trainer, stale, 0

    def _generate(self, prompt_ids, sampling, seeds, on_finished):
        self.calls += 1
        first, k = self.trainer.accelerator.process_index * len(prompt_ids), self.num_generations
        ids = [completion(p, (first + i) % k, self.calls) for i, p in enumerate(prompt_ids)]
        logps = [[-2.65 - (x * 5 + t * 3) % 7 / 4 for t, x in enumerate(row)] for row in ids]
        versions = [self.versions(row) for row in ids] if self.stale else None
        reasons = ["stop" if i[-1] == 1 else "length" for i in ids]
        return Rollout(ids, reasons, logps, token_versions=versions)

    def versions(self, ids):
        """New weights came when a third of the completions had been sampled, another third had
        none of its tokens yet."""
        at = [0, len(ids) // 2, len(ids)][sum(ids) % 3]
        return [self.version - 1 - sum(ids) % 2] * at + [self.version] * (len(ids) - at)

    @property
    def num_generations(self):
        return self.trainer.args.num_generations


# Rewards


def only_long_prompts(prompts, completion_ids, **kwargs):
    """One group in each of the first two steps, two in the third; 0 for the others."""
    rewards = first_reward(completion_ids)
    return [r if len(p.split()) >= 4 else 0.0 for p, r in zip(prompts, rewards, strict=True)]


# A run


def make_trainer(out_dir: Path, models: Path, **settings) -> RLOOTrainer:
    model = models / settings.pop("model", "qwen2")
    reward: Any = settings.pop("reward", first_reward)
    lora, sample = settings.pop("lora", False), settings.pop("sample", False)
    engine = engine_fields(settings.pop("engine", None), settings.pop("more", None))
    out_of_memory, room = settings.pop("out_of_memory", False), settings.pop("room", False)
    dataset = WITH_SYSTEM if settings.pop("system", False) else DATASET
    stale = settings.pop("stale", False)
    defaults = dict(
        max_completion_length=MAX_NEW,
        max_steps=3,
        learning_rate=0.005,
        optim="sgd",
        max_grad_norm=20.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        # the log-probs of the injected completions are made up, too
        logp_diff_stop=None if sample else 0.0,
    )
    args = RLOOConfig(str(out_dir), **{**defaults, **engine, **settings})
    trainer = RLOOTrainer(
        with_adapters(model) if lora == "passed in" else str(model),
        globals()[reward] if isinstance(reward, str) else reward,
        args,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(5)),
        processing_class=make_tokenizer(),
        peft_config=LORA if lora is True else None,
    )
    trainer.remove_callback(PrinterCallback)
    if not sample:
        trainer.rollouts.engine = Injected(trainer, stale)
    if room:
        trainer.rollouts.room = TightRoom(trainer)
    if out_of_memory:
        plant_out_of_memory(trainer)
    return trainer


def with_adapters(model: Path):
    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), LORA)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()  # as DeepSpeed in bf16 would
    return adapted


def plant_out_of_memory(trainer) -> None:
    """The first training forward on the last rank fails, which is of its largest micro-batch."""
    calls = []

    def fail_once(*_):
        if torch.is_grad_enabled() and trainer.accelerator.is_last_process:
            calls.append(1)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer.model.get_input_embeddings().register_forward_hook(fail_once)


def recorded(trainer) -> dict[str, list]:
    """Filled in by every step to come: what this rank sampled, held and ran."""
    kept: dict[str, list] = {"completions": [], "tokens": [], "rows_run": []}
    generate, attempt = trainer.rollouts.engine.generate, trainer.update.updater.attempt

    def record_rollout(*args, **kwargs):
        rollout = generate(*args, **kwargs)
        kept["completions"].append(rollout.completion_ids)
        return rollout

    def record_step(*args, **kwargs):
        result = attempt(*args, **kwargs)
        if result is not None:
            kept["tokens"].append(int(result.rows.tokens.sum()))
            kept["rows_run"].append(int(result.rows.ran.sum()))
        return result

    trainer.rollouts.engine.generate, trainer.update.updater.attempt = record_rollout, record_step
    return kept


def weights_of(trainer) -> dict[str, torch.Tensor]:
    """By name, whole; where the engine computes in bf16, the float32 ones that it updates."""
    if trainer.args.bf16 and trainer.is_fsdp_enabled:
        return {name: p.full_tensor() for name, p in trainer.model.state_dict().items()}
    weights = whole_state(trainer)
    if trainer.args.bf16 and trainer.is_deepspeed_enabled:
        from deepspeed.utils import (  # pyright: ignore[reportMissingImports]
            safe_get_full_fp32_param,
        )

        updated = {n: safe_get_full_fp32_param(p) for n, p in trainer.model.named_parameters()}
        weights |= {name: p for name, p in updated.items() if p is not None}
    return weights


def memory_of(trainer, known: set[int]) -> dict | None:
    """With `room`: what is measured, what Python's tensors and DDP's buckets have, what moved."""
    room = trainer.rollouts.room
    if room is None:
        return None
    known |= room.host_slabs()
    live = sum(size for place, size in live_storages().items() if place not in known)
    return {
        "measured": room.held().total,
        "live": live + room.memory.fixed_bytes(),
        "moved": room.seen,
    }


def train(out_dir: Path, models: Path, evaluate: bool = True, **settings) -> dict:
    before = live_storages() if settings.get("room") else {}
    trainer = make_trainer(out_dir, models, **settings)
    kept = recorded(trainer)
    start = whole_state(trainer)
    trainer.train()
    memory = memory_of(trainer, {*before, *(t.data_ptr() for t in start.values())})
    if evaluate:
        trainer.evaluate()
    assert trainer.update.planner.budget.num_halvings == int(settings.get("out_of_memory", False))
    result = {
        "start": start,
        "weights": weights_of(trainer),
        "logs": trainer.state.log_history,
        "ranks": gather_object([kept]),
        "memory": memory,
    }
    if trainer.reference is not None:
        with trainer.parallel.whole_weights(trainer.reference.model):
            named = trainer.reference.model.named_parameters()
            result["reference"] = {name: p.detach().clone() for name, p in named}
    return result


def leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo of torch 2.13 sometimes aborts in its destructor, after correct results


def main(out: Path, models: Path, cases: list[dict]) -> None:
    torch.set_num_threads(1)
    for i, settings in enumerate(cases):
        if i <= len(ENGINES):
            gc.collect()
            gc.freeze()  # every train() begins with a collection: spare what is imported by now
        try:
            result = train(out / str(i), models, **settings)
        except Exception as error:
            error.add_note(f"in the run with {settings}")
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(result, out / f"{i}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
