"""One rank of the tests of checkpoints with several processes.

python -m tests.support.resume_worker OUT_DIR JOBS_JSON      (under torchrun)

JOBS_JSON: [[name of a function below, its keyword arguments]]. Each job works in OUT_DIR/<name> and
returns facts, which go to OUT_DIR/facts.json: true where they are on every rank.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.checkpoint.files import INCOMPLETE, checkpoints
from rloo_fast.records import PreparedBatch
from tests.support.cpu_engines import engine_fields, whole_state
from tests.support.damage import DAMAGES, make_up_manifest, plant
from tests.support.kill_resume import ROWS, random_reward, without_times
from tests.support.tiny import make_tokenizer

STEPS, SAVED = 5, 3
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "num_generations": 2,
    "num_iterations": 2,  # half of the completions still wait in the checkpoint of an odd step
    "max_completion_length": 6,
    "max_steps": STEPS,
    "save_steps": SAVED,
    "logging_steps": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 4,
    "beta": 0.1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "gradient_checkpointing": False,
}
# No completions wait in checkpoint-4, but a loss that has not been logged does. The gradient of a
# key's bias is 0 but for rounding, which Adam would blow up without an epsilon above it.
AT_REST = {"max_steps": 6, "save_steps": 4, "logging_steps": 3, "adam_epsilon": 1e-4}
# these depend on how the rows are cut into micro-batches
OF_MICRO_BATCHES = ("val/ratio", "val/ratio_var", "update/tokens_run", "update/micro_batches")
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 2}


def make_trainer(
    output_dir: Path,
    engine: str,
    lora: bool | str = False,
    policy: str = "qwen2",
    reward: Any = random_reward,
    **settings: Any,
) -> RLOOTrainer:
    """`random_reward` draws from random numbers, which a resumed run must go on with.

    `lora`: new adapters, or "passed in": a PeftModel, whose adapter is the reference too.
    `policy`: a directory two levels above `output_dir`.
    """
    fields = {**SETTINGS, **({"disable_dropout": False} if lora else {}), **settings}
    args = RLOOConfig(str(output_dir), **fields, **engine_fields(engine))
    model: Any = str(output_dir.parent.parent / policy)
    adapters = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    if lora == "passed in":
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), adapters)
    dataset = Dataset.from_list(ROWS)
    trainer = RLOOTrainer(
        model,
        reward,
        args,
        dataset,
        dataset.select(range(4)),
        processing_class=make_tokenizer(),
        peft_config=adapters if lora is True else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Run:
    """A training run, and what is compared of it."""

    def __init__(self, trainer: RLOOTrainer, resume: Path | bool = False):
        self.trainer, self.completions = trainer, []
        add = trainer.buffer.add

        def noted(batch: PreparedBatch) -> None:
            completions = batch.generation.completion_ids
            self.completions.append((trainer.state.global_step, completions))
            add(batch)

        trainer.buffer.add = noted
        self.loss = trainer.train(str(resume) if isinstance(resume, Path) else resume).training_loss
        self.weights = trained_weights(trainer)
        self.logs = without_times(trainer.state.log_history)

    def optimizer_state(self) -> Any:
        if self.trainer.is_deepspeed_enabled:
            return self.trainer.parallel.engine.optimizer.state_dict()  # pyright: ignore
        return list(self.trainer.optimizer.state.values())  # pyright: ignore

    def reference_state(self) -> Any:
        assert self.trainer.reference is not None
        parameters = self.trainer.reference.model.named_parameters()
        return {name: getattr(p, "ds_tensor", p).detach() for name, p in parameters}


def trained_weights(trainer: RLOOTrainer) -> dict[str, torch.Tensor]:
    """What the optimizer updates, whole."""
    if trainer.parallel.name != "FSDP2":
        return whole_state(trainer)
    split: Any = dict(trainer.model.named_parameters())
    return {name: parameter.detach().full_tensor() for name, parameter in split.items()}


def same(one: Any, other: Any) -> bool:
    """Bit for bit, whatever is in it."""
    if isinstance(one, DTensor):
        one, other = one.to_local(), other.to_local()
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or not isinstance(one, int | float | str | bool)


def close(one: Any, other: Any) -> bool:
    """Equal to rounding."""
    if isinstance(one, torch.Tensor):
        return bool((one - other).norm() <= 1e-5 * other.norm())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[k], other[k]) for k in one)
    return isinstance(one, str) or math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5)


# Jobs


def exact(out: Path, **settings: Any) -> dict[str, bool]:
    """A run, and another one from its checkpoint of step 3."""
    whole = Run(make_trainer(out / "whole", **settings))
    random.seed(99)
    torch.manual_seed(99)
    resumed = Run(make_trainer(out / "resumed", **settings), out / "whole" / f"checkpoint-{SAVED}")
    late = [c for c in whole.completions if c[0] >= SAVED]
    whole.trainer.save_model(str(out / "final"))
    if whole.trainer.accelerator.is_main_process:
        torch.save(whole.weights, out / "weights.pt")
    facts = {
        "weights": same(whole.weights, resumed.weights),
        "optimizer": same(whole.optimizer_state(), resumed.optimizer_state()),
        "logs": whole.logs == resumed.logs and whole.loss == resumed.loss,
        "completions": late == resumed.completions and len(late) == 1,
    }
    if whole.trainer.reference is not None:
        facts["reference"] = same(whole.reference_state(), resumed.reference_state())
    return facts


def saved(out: Path, **settings: Any) -> dict[str, bool]:
    """A run whose checkpoints other launches resume from; see `resumed`."""
    run = Run(make_trainer(out / "whole", reward=count_words, **AT_REST, **settings))
    if run.trainer.accelerator.is_main_process:
        torch.save((run.weights, run.logs), out / "whole.pt")
    return {}


def resumed(out: Path, **settings: Any) -> dict[str, bool]:
    """From the checkpoint of `saved`, with other processes but the same batch."""
    trainer = make_trainer(out / "resumed", reward=count_words, **AT_REST, **settings)
    run = Run(trainer, out / "whole" / "checkpoint-4")
    weights, logs = torch.load(out / "whole.pt")
    for row in [*run.logs, *logs]:
        for name in OF_MICRO_BATCHES:
            row.pop(name, None)
    return {"weights": close(run.weights, weights), "logs": all(map(close, run.logs, logs))}


def refused(out: Path, why: str, **settings: Any) -> dict[str, bool]:
    trainer = make_trainer(out / "refused", **settings)
    try:
        trainer.train(str(out / "whole" / f"checkpoint-{SAVED}"))
    except ValueError as error:
        return {"refused": why in str(error), "before it is wrapped": trainer.optimizer is None}
    return {"refused": False}


def made_up(out: Path, whole: str, **settings: Any) -> dict[str, bool]:
    """Checkpoints of the run `whole` of `exact` that are damaged, or would run code when loaded.

    What is said of each goes to OUT_DIR/<name>/said.json. Facts: the kind of file and damage.
    """
    trainer = make_trainer(out / "run", **settings)
    checkpoint, ran = out / f"checkpoint-{SAVED}", out / "ran"
    main = trainer.accelerator.is_main_process
    said = {}
    for name in _one_of_each_kind(out.parent / whole / "whole" / checkpoint.name):
        damages = {**DAMAGES, "a payload": lambda path: plant(path, ran)}
        for damage, spoil in damages.items():
            if damage == "a payload" and not _is_pickled(name):
                continue
            if main:
                shutil.rmtree(checkpoint, ignore_errors=True)
                shutil.copytree(out.parent / whole / "whole" / checkpoint.name, checkpoint)
                spoil(checkpoint / name)
                if damage == "a payload":
                    make_up_manifest(checkpoint)
            trainer.accelerator.wait_for_everyone()
            said[f"{name}: {damage}"] = _refusal(trainer, checkpoint)
            trainer.accelerator.wait_for_everyone()
    if main:
        (out / "said.json").write_text(json.dumps(said, indent=0))
    # of a DCP, the record stands for the files
    named = {
        case: case.split(":")[0].replace("__0_0.distcp", "") in why for case, why in said.items()
    }
    return {**named, "nothing ran": not ran.exists(), "before a step": trainer.optimizer is None}


def elsewhere(out: Path, whole: str, **settings: Any) -> dict[str, bool]:
    """Files beside the checkpoint, which is whole: their loaders alone keep them from running."""
    checkpoint, ran = out / f"checkpoint-{SAVED}", out / "ran"
    outside = out / "outside"
    trainer = make_trainer(out / "run", **settings)
    if trainer.accelerator.is_main_process:
        shutil.copytree(out.parent / whole / "whole" / checkpoint.name, checkpoint)
        tag = f"global_step{SAVED}"
        if (checkpoint / tag).is_dir():
            (checkpoint / "latest").write_text("../outside")
            shutil.copytree(checkpoint / tag, outside)
        else:
            (checkpoint / "optimizer_0").rename(outside)
            (checkpoint / "optimizer_0").symlink_to(outside)
        make_up_manifest(checkpoint)
        for path in [*outside.glob("*.pt"), *outside.glob(".metadata")]:
            plant(path, ran)
    trainer.accelerator.wait_for_everyone()
    why = _refusal(trainer, checkpoint)
    return {"refused": "holds io.open, which is no data" in why, "nothing ran": not ran.exists()}


def _refusal(trainer: RLOOTrainer, checkpoint: Path) -> str:
    try:
        trainer.train(str(checkpoint))
    except ValueError as error:
        return str(error)
    return ""


def _is_pickled(name: str) -> bool:
    if name.endswith(".distcp"):
        return name.startswith("optimizer")  # the others hold tensors alone
    path = Path(name)
    pickled = path.suffix in (".pt", ".pth", ".bin") or path.name == ".metadata"
    return pickled and path.name != "training_args.bin"


def _one_of_each_kind(checkpoint: Path) -> list[str]:
    """Of the files that each rank, or each model, has one of: the first."""
    files = [str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()]
    kinds = {re.sub(r"\d+", "0", name): name for name in sorted(files, reverse=True)}
    return sorted(kinds.values())


def unlucky(out: Path, **settings: Any) -> dict[str, bool]:
    """Files cannot grow on rank 0 in step 2 and on rank 1 in step 3; in step 4, rank 1 raises."""
    trainer = make_trainer(out / "run", save_steps=1, **settings)
    trainer.add_callback(Unlucky(trainer))
    run = Run(trainer)
    names = [path.name for path in checkpoints(out / "run")]
    again = Run(make_trainer(out / "again", **settings), out / "run" / "checkpoint-1")
    return {
        "failed saves": trainer.checkpoints.num_failed == 3,
        "the others stay": names == ["checkpoint-1", f"checkpoint-{STEPS}"],
        "no half one": not (out / "run" / INCOMPLETE).exists(),
        "resumed": same(run.weights, again.weights),
    }


class Unlucky(TrainerCallback):
    def __init__(self, trainer: RLOOTrainer):
        self.trainer, self.state_dict = trainer, trainer.run_state.state_dict

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, rank = state.global_step + 1, self.trainer.accelerator.process_index
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        full = (step, rank) in ((2, 0), (3, 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if full else most, most))
        planted = (step, rank) == (4, 1)
        self.trainer.run_state.state_dict = no_room if planted else self.state_dict


def no_room() -> Any:
    raise OSError("no room")


def terminated(out: Path, whole: str, **settings: Any) -> dict[str, bool]:
    """SIGTERM on the last rank in the middle of a buffer; `whole`: the same run in `exact`."""
    trainer = make_trainer(out / "run", save_steps=100, **settings)
    trainer.add_callback(Terminate())
    code = None
    try:
        trainer.train()
    except SystemExit as end:
        code = end.code
    names = [path.name for path in checkpoints(out / "run")]
    again = Run(make_trainer(out / "run", **settings), True)
    return {
        "exit 0": code == 0,
        "saved": names == [f"checkpoint-{SAVED}"],
        "resumed": same(again.weights, torch.load(out.parent / whole / "weights.pt")),
    }


class Terminate(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == SAVED and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def best(out: Path, **settings: Any) -> dict[str, bool]:
    """load_best_model_at_end, where the best is not the last."""
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward"}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 4}
    trainer = make_trainer(out / "run", reward=best_after_step_2, **settings)
    kept = KeepWeights(trainer)
    trainer.add_callback(kept)
    run = Run(trainer)
    return {
        "best": same(run.weights, kept.at[2]),
        "not the last": not same(run.weights, kept.at[4]),
    }


class KeepWeights(TrainerCallback):
    def __init__(self, trainer: RLOOTrainer):
        self.trainer, self.at = trainer, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = trained_weights(self.trainer)


def best_after_step_2(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    return [5.0 * (trainer_state.global_step == 2) + i % 2 for i in range(len(completions))]


def count_words(completions: list[str], **_: Any) -> list[float]:
    return [float(text.count("w1") + len(text) % 3) for text in completions]


JOBS = {
    job.__name__: job
    for job in (
        exact, saved, resumed, refused, made_up, elsewhere, unlucky, terminated, best,
    )
}  # fmt: skip


def main(out: Path, jobs: list[tuple[str, str, dict[str, Any]]]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # every train() begins with a collection, which then spares what was imported
    facts = {}
    for name, job, settings in jobs:
        directory = out / name
        directory.mkdir(parents=True, exist_ok=True)
        mine = JOBS[job](directory, **settings)
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        facts[name] = {fact: all(one[fact] for one in everyone) for fact in mine}
        if torch.distributed.get_rank() == 0:
            (out / "facts.json").write_text(json.dumps(facts))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo of torch 2.13 sometimes aborts in its destructor, after correct results


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
