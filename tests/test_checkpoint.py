"""A checkpoint is complete or absent; a resumed run repeats the uninterrupted one bit for bit."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from conftest import make_model
from datasets import IterableDataset
from kill_resume import ROWS, make_trainer, metrics_of, without_times
from safetensors.torch import load_file, save_file
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
)

from rloo_fast import checkpoint
from rloo_fast.callbacks import StepCallback
from rloo_fast.checkpoint_files import (
    LAUNCH,
    find_checkpoint,
    load_state,
    publish,
    rotate,
    save_launch,
)
from rloo_fast.checkpoint_weights import load_weights


class Crash(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Every train() begins with a garbage collection: spare it what was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class At(TrainerCallback):
    """Calls `action(step)` when a step begins; `step` is the one that begins."""

    def __init__(self, action: Any):
        self.action = action

    def on_step_begin(self, args, state, control, **kwargs):
        self.action(state.global_step + 1)


def crash_in(step: int) -> At:
    def action(begun: int) -> None:
        if begun == step:
            raise Crash

    return At(action)


def scramble_random_numbers() -> None:
    random.seed(99)
    numpy.random.seed(99)
    torch.manual_seed(99)


def names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir() if path.is_dir())


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same_run(one: Any, other: Any) -> None:
    """Every logged value, every line of metrics.jsonl, weights and optimizer state."""
    logs = [without_times(trainer.state.log_history) for trainer in (one, other)]
    assert logs[0] == logs[1]
    lines = [metrics_of(Path(trainer.args.output_dir)) for trainer in (one, other)]
    assert lines[0] == lines[1]
    weights = [weights_of(trainer) for trainer in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    moments = [trainer.optimizer.state_dict()["state"] for trainer in (one, other)]
    assert len(moments[0]) == len(moments[1]) > 0
    for i, state in moments[0].items():
        assert all(torch.equal(value, moments[1][i][name]) for name, value in state.items())


# --- exact resumes --------------------------------------------------------------------------------


def stream() -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(ROWS[:7]))


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


def adapted_model() -> Any:
    from peft import get_peft_model

    return get_peft_model(make_model(), lora())  # pyright: ignore


# whose saved weights have other names, or are cut otherwise, than those in memory
def renamed_head(**overrides: Any) -> Any:
    return make_other(GPTNeoXForCausalLM, GPTNeoXConfig, intermediate_size=64, **overrides)


def experts() -> Any:
    return make_other(
        MixtralForCausalLM,
        MixtralConfig,
        intermediate_size=16,
        num_key_value_heads=1,
        num_local_experts=3,
    )


def make_other(model: Any, config: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": 1}
    return model(config(**{**sizes, **ids, "initializer_range": 0.2, **fields}))


def lora_and_head() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["query_key_value"], modules_to_save=["lm_head"])


def lora_of_experts() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]
    )


# what is interrupted: (last step with a checkpoint, settings, what is made anew for every run);
# an epoch has 10 steps, or 5 with 8 rows
INTERRUPTED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "mid-epoch": (3, {}, {}),
    "mid-second-epoch": (
        7,
        {"per_device_train_batch_size": 8, "max_steps": 9, "save_steps": 7},
        {},
    ),
    "mid-buffer-iterations": (3, {"num_iterations": 2}, {}),
    "mid-buffer-steps": (
        3,
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
        },
        {},
    ),
    "mid-buffer-token-level": (3, {"num_iterations": 2, "token_level_kl": True}, {}),
    "epoch-boundary": (5, {"per_device_train_batch_size": 8, "max_steps": 7, "save_steps": 5}, {}),
    "epoch-boundary-logs": (
        5,
        {
            "per_device_train_batch_size": 8,
            "max_steps": 7,
            "save_steps": 5,
            "logging_strategy": "epoch",
            "eval_strategy": "epoch",
        },
        {},
    ),
    "between-logs": (4, {"logging_steps": 3, "save_steps": 2, "num_iterations": 3}, {}),
    "moving-reference": (3, {"sync_ref_model": True, "ref_model_sync_steps": 2}, {}),
    "stream": (3, {}, {"train_dataset": stream}),
    "lora": (3, {"disable_dropout": False}, {"peft_config": lora}),
    "lora-reference": (3, {}, {"model": adapted_model}),
    "schedule": (3, {"lr_scheduler_type": "cosine", "warmup_steps": 4}, {}),
    "evaluations": (
        4,
        {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True, "save_steps": 2},
        {},
    ),
    "dropout": (
        3,
        {"disable_dropout": False, "gradient_checkpointing": True},
        {"model": lambda: make_model(attention_dropout=0.1)},
    ),
    "renamed-head": (3, {}, {"model": renamed_head}),
    "renamed-head-lora": (3, {}, {"model": renamed_head, "peft_config": lora_and_head}),
    "experts": (3, {}, {"model": experts}),
    "experts-lora": (3, {}, {"model": experts, "peft_config": lora_of_experts}),
}


@pytest.mark.parametrize("what", INTERRUPTED)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, what):
    step, settings, made = INTERRUPTED[what]

    def trainer(run: str) -> Any:
        return make_trainer(tmp_path / run, **settings, **{name: f() for name, f in made.items()})

    whole = trainer("whole")
    loss = whole.train().training_loss
    stopped = trainer("stopped")
    stopped.add_callback(crash_in(step + 1))
    with pytest.raises(Crash):
        stopped.train()
    scramble_random_numbers()
    resumed = trainer("stopped")
    resumed_loss = resumed.train(resume_from_checkpoint=True).training_loss

    assert_same_run(resumed, whole)
    assert resumed_loss == loss


def without(name: str, directory: Path) -> None:
    """One weight less in the file."""
    (file,) = directory.glob("*model.safetensors")
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, {"format": "pt"})


MISMATCHES: dict[str, tuple[Any, Any, str | None, str]] = {
    "other names": (
        renamed_head,
        make_model,
        None,
        "not in the checkpoint: .*; not in the model: ",
    ),
    "other shapes": (
        renamed_head,
        lambda: renamed_head(vocab_size=40),
        None,
        "of another shape: gpt_neox.embed_in.weight, lm_head.weight.",
    ),
    "more layers": (
        lambda: make_model(tie_word_embeddings=True),
        lambda: make_model(num_hidden_layers=3),
        None,
        r"not in the checkpoint: model.layers.2.* and 9 more\.",
    ),
    "a lost weight": (
        renamed_head,
        renamed_head,
        "embed_out.weight",
        r"Weights not in the checkpoint: lm_head.weight\.",
    ),
    "a lost adapter weight": (
        adapted_model,
        adapted_model,
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        r"not in the checkpoint: base_model.*q_proj.lora_A.default.weight\.",
    ),
    "adapters into none": (adapted_model, make_model, None, "It holds adapters, and the run"),
    "none into adapters": (make_model, adapted_model, None, "it holds none 'default'"),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_weights_of_another_model_are_refused(tmp_path, what):
    save, load, lost, why = MISMATCHES[what]
    save().save_pretrained(tmp_path)
    if lost:
        without(lost, tmp_path)
    model = load()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    with pytest.raises(ValueError, match=f"(?s)was saved from another model.*{why}"):
        load_weights(model, str(tmp_path))

    if what != "a lost adapter weight":
        assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_what_an_engine_leaves_out_is_refused(tmp_path):
    make_trainer(tmp_path, max_steps=3).train()
    trainer = make_trainer(tmp_path / "other", model=make_model(num_hidden_layers=1))
    trainer._resume_from = str(tmp_path / "checkpoint-3")  # whose weights an engine has loaded

    with pytest.raises(ValueError, match=r"not in the model: model.layers.1.* and 9 more\."):
        trainer.restore_run_state()


def test_every_weight_keeps_its_precision(tmp_path):
    saved, loaded = (make_model(seed).bfloat16() for seed in (0, 1))
    for model in (saved, loaded):
        model.lm_head.float()
    saved.lm_head.weight.data += 1e-5

    saved.save_pretrained(tmp_path, max_shard_size="20kB")
    load_weights(loaded, str(tmp_path))

    assert (tmp_path / "model.safetensors.index.json").is_file()
    for name, weight in saved.state_dict().items():
        assert loaded.state_dict()[name].dtype == weight.dtype
        assert torch.equal(loaded.state_dict()[name], weight)


def test_tied_weights_stay_tied(tmp_path):
    saved, loaded = (make_model(seed, tie_word_embeddings=True) for seed in (0, 1))

    saved.save_pretrained(tmp_path)
    load_weights(loaded, str(tmp_path))

    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight)


def test_the_checkpoint_restores_completions_and_what_is_known_of_them(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=2, max_steps=3)
    trainer.train()

    (_, samples), = load_state(str(tmp_path / "checkpoint-3"), 0)["buffer"]["queue"]  # fmt: skip

    (_, kept), = trainer.buffer.queue  # fmt: skip
    assert samples["completion_ids"] == kept.completion_ids
    for name in ("old_logps", "ref_logps", "advantages", "scores"):
        assert torch.equal(samples[name], getattr(kept, name))


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path):
    # in the middle of an epoch, where transformers takes one step more
    whole = make_trainer(tmp_path, num_iterations=2, logging_strategy="epoch")
    whole.train()
    lines = metrics_of(tmp_path)
    resumed = make_trainer(tmp_path, num_iterations=2, logging_strategy="epoch")
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == 6
    assert metrics_of(tmp_path) == lines
    assert_same_run(resumed, whole)


def test_evaluations_around_the_training_do_not_spoil_a_resumed_metrics_file(tmp_path):
    for resume in (False, True):
        trainer = make_trainer(tmp_path)
        trainer.evaluate()
        trainer.train(resume_from_checkpoint=resume)
        trainer.evaluate()
        if not resume:
            lines = metrics_of(tmp_path)

    assert metrics_of(tmp_path) == lines
    assert not (tmp_path / "metrics.1.jsonl").exists()


# --- which checkpoint -----------------------------------------------------------------------------


def fake_checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    save_launch(path, launch(), completions_wait=False)
    return path


def launch(engine: str = "DDP", num_processes: int = 1, tied: bool = False) -> Any:
    """Who saves a checkpoint, or resumes from it."""
    return SimpleNamespace(
        name=engine,
        checkpoints_are_tied=tied,
        accelerator=SimpleNamespace(num_processes=num_processes),
    )


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", ".incomplete/checkpoint-11", "other-12"):
        fake_checkpoint(tmp_path / name)

    assert find_checkpoint(True, str(tmp_path)) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("resume", [None, False])
def test_no_checkpoint_is_looked_for_unless_asked(tmp_path, resume):
    fake_checkpoint(tmp_path / "checkpoint-9")

    assert find_checkpoint(resume, str(tmp_path)) is None


@pytest.mark.parametrize("exists", [True, False])
def test_resuming_where_there_is_no_checkpoint_is_refused(tmp_path, exists):
    if exists:
        fake_checkpoint(tmp_path / "run/.incomplete/checkpoint-1")

    with pytest.raises(ValueError, match="holds no checkpoint: start without it, or give"):
        find_checkpoint(True, str(tmp_path / "run"))


@pytest.mark.parametrize("name", ["nothing", "empty", ".incomplete/checkpoint-2"])
def test_resuming_from_what_is_no_checkpoint_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    fake_checkpoint(tmp_path / ".incomplete/checkpoint-2")

    with pytest.raises(ValueError, match=f"{name}' is not a complete checkpoint: give a directory"):
        find_checkpoint(str(tmp_path / name), str(tmp_path))


@pytest.mark.parametrize("resume", [True, "checkpoint-3"])
def test_resuming_from_weights_alone_is_refused_before_anything_is_loaded(tmp_path, resume):
    make_trainer(tmp_path, save_only_model=True, max_steps=3).train()
    trainer = make_trainer(tmp_path, model=make_model(seed=1))
    before = weights_of(trainer)

    with pytest.raises(ValueError, match="save_only_model=True, and cannot be resumed from"):
        trainer.train(str(tmp_path / resume) if isinstance(resume, str) else resume)

    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(trainer).items())


@pytest.mark.parametrize(
    ("saved", "wait", "now", "why"),
    [
        (launch("FSDP2", 2), False, launch(), "saved with FSDP2 and cannot be resumed with DDP"),
        (launch("ZeRO-3", 2), False, launch("ZeRO-2", 2, tied=True), "launch with ZeRO-3, or give"),
        (
            launch("ZeRO-3", 2),
            False,
            launch("ZeRO-3", 4, tied=True),
            "with ZeRO-3 by 2 processes and cannot be resumed by 4: launch 2, or give",
        ),
        (launch(num_processes=2), True, launch(), "dealt out to 2 processes, which 1 cannot"),
    ],
)
def test_a_checkpoint_of_another_launch_is_refused(tmp_path, saved, wait, now, why):
    path = fake_checkpoint(tmp_path / "checkpoint-1")
    save_launch(path, saved, wait)

    with pytest.raises(ValueError, match=why):
        find_checkpoint(str(path), str(tmp_path), now)


def test_other_launches_go_on_where_the_engine_allows(tmp_path):
    path = fake_checkpoint(tmp_path / "checkpoint-1")
    for saved, wait, now in (
        (launch("FSDP2", 2), False, launch("FSDP2", 4)),
        (launch("FSDP2", 2), True, launch("FSDP2", 2)),
        (launch("ZeRO-3", 2), True, launch("ZeRO-3", 2, tied=True)),
    ):
        save_launch(path, saved, wait)
        assert find_checkpoint(str(path), str(tmp_path), now) == str(path)


def test_other_batch_sizes_are_refused_while_completions_wait(tmp_path):
    make_trainer(tmp_path, num_iterations=2, max_steps=3).train()
    trainer = make_trainer(tmp_path, num_iterations=2, per_device_train_batch_size=8)

    with pytest.raises(ValueError, match=r"\[4, 1, 2\], but now they are \[8, 1, 2\]"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("below", ["run", "deep/run"])
def test_an_output_dir_that_cannot_be_written_to_is_named(tmp_path, below):
    (tmp_path / "file").write_text("")
    output_dir = tmp_path / "file" / below

    with pytest.raises(ValueError, match=f"output_dir '{output_dir}' cannot be written to"):
        make_trainer(output_dir)


# --- renames --------------------------------------------------------------------------------------


def test_a_replacement_cut_between_its_renames_is_undone(tmp_path):
    fake_checkpoint(tmp_path / "checkpoint-2")
    fake_checkpoint(tmp_path / ".incomplete/replaced-checkpoint-4")
    fake_checkpoint(tmp_path / ".incomplete/checkpoint-4")

    assert find_checkpoint(True, str(tmp_path)) == str(tmp_path / "checkpoint-4")


def test_a_checkpoint_survives_a_replacement_that_fails(tmp_path):
    final = fake_checkpoint(tmp_path / "checkpoint-4")
    (tmp_path / ".incomplete").mkdir()

    with pytest.raises(OSError, match="checkpoint-4"):
        publish(tmp_path / ".incomplete/checkpoint-4", final)  # never written

    assert (final / "trainer_state.json").exists()


@pytest.mark.parametrize(
    ("limit", "newest", "best", "left"),
    [
        (2, 8, None, [6, 8]),
        (2, 8, 2, [2, 8]),
        (1, 8, 2, [2, 8]),
        (1, 8, 8, [8]),
        (1, 8, 99, [8]),  # the best one is gone
        (2, 4, None, [2, 4]),  # 6 and 8 are an earlier run's
        (None, 8, None, [2, 4, 6, 8]),
    ],
)
def test_save_total_limit_keeps_the_newest_and_the_best(tmp_path, limit, newest, best, left):
    for step in (2, 4, 6, 8):
        fake_checkpoint(tmp_path / f"checkpoint-{step}")
    best_path = best and os.path.relpath(tmp_path / f"checkpoint-{best}")

    rotate(tmp_path, limit, tmp_path / f"checkpoint-{newest}", best_path)

    assert [n for n in names(tmp_path) if n != ".incomplete"] == [f"checkpoint-{n}" for n in left]


def test_nothing_but_the_limited_number_of_checkpoints_is_left(tmp_path):
    make_trainer(tmp_path, save_steps=1, save_total_limit=2).train()

    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]


def test_saved_arguments_are_those_of_the_run(tmp_path):
    make_trainer(tmp_path, save_total_limit=2, max_steps=1).train()

    saved = torch.load(tmp_path / "checkpoint-1/training_args.bin", weights_only=False)

    assert saved.save_total_limit == 2


def test_a_checkpoint_is_pushed_from_where_it_stays(tmp_path, monkeypatch):
    pushed = []

    def push(self: Any, folder: str) -> None:
        pushed.append((folder, (Path(folder) / LAUNCH).exists()))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.args.push_to_hub = True
    trainer.train()

    assert pushed == [(str(tmp_path / "checkpoint-3"), True)]


# --- the best checkpoint --------------------------------------------------------------------------

SCORES = {2: 5.0, 4: 9.0, 6: 7.0}


def scheduled_reward(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    return [SCORES.get(trainer_state.global_step, 0.0) + i % 2 for i in range(len(completions))]


BEST: dict[str, Any] = {
    "reward": scheduled_reward,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_reward",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "save_total_limit": 1,
}


class KeepWeights(TrainerCallback):
    """The weights at every step's end."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.at[state.global_step] = {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("model", [make_model, renamed_head])
def test_the_best_weights_are_loaded_at_the_end(tmp_path, model):
    trainer, kept = make_trainer(tmp_path, **BEST, model=model()), KeepWeights()
    trainer.add_callback(kept)
    trainer.train()

    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert all(torch.equal(kept.at[4][name], t) for name, t in weights_of(trainer).items())
    assert not torch.equal(kept.at[4]["lm_head.weight"], kept.at[6]["lm_head.weight"])


@pytest.mark.parametrize("step", [4, 6])
def test_a_checkpoint_names_the_best_one_where_it_lies(tmp_path, step):
    make_trainer(tmp_path, **BEST).train()

    state = json.loads((tmp_path / f"checkpoint-{step}/trainer_state.json").read_text())

    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")
    assert state["best_global_step"] == 4


def test_a_moved_output_dir_keeps_its_best_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path / "old", **BEST)
    trainer.add_callback(crash_in(5))
    with pytest.raises(Crash):
        trainer.train()
    (tmp_path / "old").rename(tmp_path / "new")

    resumed = make_trainer(tmp_path / "new", **BEST)
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.best_model_checkpoint == str(tmp_path / "new/checkpoint-4")
    assert names(tmp_path / "new") == ["checkpoint-4", "checkpoint-6"]


def block_saves(output_dir: Path, steps: range) -> At:
    """A plain file lies where checkpoints are written, while `steps` run."""

    def action(step: int) -> None:
        path = output_dir / ".incomplete"
        if step in steps:
            path.write_text("")
        else:
            path.unlink(missing_ok=True)

    return At(action)


def test_a_best_checkpoint_that_could_not_be_saved_is_not_the_best(tmp_path):
    trainer = make_trainer(tmp_path, **BEST)
    trainer.add_callback(block_saves(tmp_path, range(4, 5)))
    trainer.train()

    assert trainer.num_failed_saves == 1
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")


def test_a_best_checkpoint_lost_in_its_last_fsync_leaves_the_former_one(tmp_path, monkeypatch):
    def sync_tree(root: Path) -> None:
        if root.name == "checkpoint-4":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "sync_tree", sync_tree)
    trainer = make_trainer(tmp_path, **{**BEST, "max_steps": 4})
    trainer.train()

    assert names(tmp_path) == ["checkpoint-2"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


# --- failing saves --------------------------------------------------------------------------------


def test_a_failed_save_is_reported_and_the_run_goes_on(tmp_path, caplog):
    trainer = make_trainer(tmp_path, save_steps=1)
    trainer.add_callback(block_saves(tmp_path, range(3, 5)))
    trainer.train()

    assert trainer.num_failed_saves == 2
    assert names(tmp_path) == [f"checkpoint-{n}" for n in (1, 2, 5, 6)]
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 2
    assert errors[0].startswith("checkpoint-3 could not be saved (")
    assert errors[0].endswith("Training goes on; the newest checkpoint is checkpoint-2.")


@pytest.fixture
def small_disk(tmp_path):
    """resize(KiB) of a disk of its own at the returned path."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "rloo_fast_test", str(path)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip(
            "no right to mount a small disk; test_train_resume limits the file size instead"
        )

    def resize(kib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(path)], check=True)

    yield path, resize
    if subprocess.run(["umount", str(path)]).returncode:
        subprocess.run(["umount", "-l", str(path)], check=True)
        pytest.fail("a file of a save that failed is still open: its space is not free")


def test_a_full_disk_costs_checkpoints_only_while_it_is_full(small_disk, tmp_path):
    path, resize = small_disk
    settings = {"save_steps": 1, "save_total_limit": 1}
    reference = make_trainer(tmp_path / "reference", **settings)
    reference.train()
    output_dir = path / "run"
    trainer = make_trainer(output_dir, **settings)

    def action(step: int) -> None:
        used = shutil.disk_usage(path).used // 1024
        if step == 2:
            resize(used + used // 2)  # one checkpoint fits, a second one beside it does not
        if step == 4:
            assert names(output_dir) == ["checkpoint-1"]
            resize(8192)

    trainer.add_callback(At(action))
    trainer.train()

    assert trainer.num_failed_saves == 2
    assert names(output_dir) == ["checkpoint-6"]
    assert_same_run(trainer, reference)


# --- SIGTERM --------------------------------------------------------------------------------------


def terminate_in(step: int) -> At:
    def action(begun: int) -> None:
        if begun == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return At(action)


TERMINATED: dict[str, tuple[int, dict[str, Any]]] = {
    "mid-epoch": (4, {"logging_strategy": "epoch", "eval_strategy": "epoch"}),
    "mid-buffer": (3, {"num_iterations": 2, "logging_steps": 2}),
    "no-other-saves": (4, {"save_strategy": "no"}),
    "saves-by-epoch": (4, {"save_strategy": "epoch"}),
    "end-of-epoch": (5, {"per_device_train_batch_size": 8, "logging_strategy": "epoch"}),
    "last-step": (6, {"logging_strategy": "epoch"}),
}


@pytest.mark.parametrize("when", TERMINATED)
def test_sigterm_saves_the_running_step_and_the_resumed_run_is_exact(tmp_path, when):
    step, settings = TERMINATED[when]
    settings = {"save_steps": 100, **settings}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", **settings)
    stopped.add_callback(terminate_in(step))
    with pytest.raises(SystemExit) as end:
        stopped.train()
    assert end.value.code == 0
    assert names(tmp_path / "stopped") == [f"checkpoint-{step}"]
    scramble_random_numbers()
    resumed = make_trainer(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)

    assert_same_run(resumed, whole)


def test_sigterm_keeps_its_checkpoint_beside_the_best_one(tmp_path):
    trainer = make_trainer(tmp_path, **BEST)
    trainer.add_callback(terminate_in(5))
    with pytest.raises(SystemExit):
        trainer.train()

    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]


def test_sigterm_exits_with_1_if_nothing_could_be_saved(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(block_saves(tmp_path, range(1, 9)))
    trainer.add_callback(terminate_in(2))

    with pytest.raises(SystemExit) as end:
        trainer.train()

    assert end.value.code == 1
    assert "the checkpoint of step 2 could not be saved" in caplog.text


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_sigterm_after_the_last_step_leaves_nothing_unsaved(tmp_path, save_strategy):
    class Late(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(tmp_path, save_strategy=save_strategy)
    trainer.add_callback(Late())

    if save_strategy == "no":  # the script goes on, and can save the model
        assert trainer.train().global_step == 6
    else:
        with pytest.raises(SystemExit) as end:
            trainer.train()
        assert end.value.code == 0


def test_the_former_handler_of_sigterm_is_back_after_training(tmp_path):
    former = signal.getsignal(signal.SIGTERM)
    make_trainer(tmp_path, max_steps=1).train()

    assert signal.getsignal(signal.SIGTERM) == former


# --- gradients that are not finite ----------------------------------------------------------------


def plant(trainer: Any, steps: set[int], value: float = float("nan")) -> None:
    """One gradient entry of the trainer's model becomes `value` in these steps."""

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        if trainer.state.global_step + 1 in steps:
            grad = grad.clone()
            grad[0] = value
        return grad

    trainer.model.model.norm.weight.register_hook(spoil)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(tmp_path, value, max_grad_norm):
    trainer = make_trainer(tmp_path, max_grad_norm=max_grad_norm, weight_decay=0.1)
    plant(trainer, {3, 5}, value)
    kept: dict[int, Any] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            assert optimizer is not None
            moments = [t.clone() for s in optimizer.state.values() for t in s.values()]
            kept[state.global_step] = [*weights_of(trainer).values(), *moments]

    trainer.add_callback(Keep())
    trainer.train()

    assert trainer.num_skipped_steps == 2
    same = [
        all(torch.equal(a, b) for a, b in zip(kept[step - 1], kept[step], strict=True))
        for step in range(2, 7)
    ]
    assert same == [False, True, False, True, False]


def test_skipped_steps_leave_the_logged_loss_of_the_run_finite(tmp_path):
    trainer = make_trainer(tmp_path)
    backward = trainer.updater.backward

    def nan_at_3(*args: Any) -> Any:
        loss, *rest = backward(*args)
        return (loss * float("nan") if trainer.state.global_step == 2 else loss), *rest

    trainer.updater.backward = nan_at_3

    assert numpy.isfinite(trainer.train().training_loss)


def test_too_many_such_steps_in_a_row_end_the_run(tmp_path):
    trainer = make_trainer(tmp_path, max_nonfinite_steps=2)
    plant(trainer, {2, 4, 5})

    with pytest.raises(FloatingPointError, match="2 steps in a row had a loss or gradient that is"):
        trainer.train()

    assert trainer.state.global_step == 4
    assert trainer.num_skipped_steps == 3


def test_a_resumed_run_goes_on_counting_them(tmp_path):
    settings = {"max_nonfinite_steps": 3, "save_steps": 4}
    trainer = make_trainer(tmp_path, **settings)
    plant(trainer, {3, 4, 5})
    trainer.add_callback(crash_in(5))
    with pytest.raises(Crash):
        trainer.train()
    resumed = make_trainer(tmp_path, **settings)
    plant(resumed, {3, 4, 5})

    with pytest.raises(FloatingPointError):
        resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == 4


def test_fp16_overflows_end_the_run_only_once_the_loss_scale_is_down(tmp_path):
    trainer = make_trainer(tmp_path, max_nonfinite_steps=1)
    callback, scaler = StepCallback(trainer), torch.amp.GradScaler("cpu", init_scale=4.0)  # pyright: ignore
    trainer.accelerator.scaler = scaler
    trainer.model_wrapped, trainer.last_grad_norm = trainer.model, float("inf")
    callback.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
    scaler._scale = torch.ones(())

    with pytest.raises(FloatingPointError):
        callback.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)


def test_the_steps_before_a_broken_reward_are_saved(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no")
    rewards, calls = trainer.rewards.functions[0], []
    function = rewards.function

    def one_too_few(**keywords):
        calls.append(1)
        values = function(**keywords)
        return values[1:] if len(calls) == 3 else values

    rewards.function = one_too_few
    with pytest.raises(ValueError, match="returned") as caught:
        trainer.train()
    step = trainer.state.global_step
    assert step > 0
    assert f"checkpoint-{step} holds the {step} steps done" in caught.value.__notes__[0]
    assert names(tmp_path) == [f"checkpoint-{step}"]
