"""Which training engine a run gets, and what is refused before a model is loaded."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model
from cpu_engines import require_deepspeed
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.parallel import check_launch
from rloo_fast.parallel.fsdp2 import FSDP2
from rloo_fast.redirect import run_inside, without_hooks

ZERO = {"zero_optimization": {"stage": 3}}


def config(tmp_path, **fields) -> RLOOConfig:
    return RLOOConfig(str(tmp_path), use_cpu=True, report_to="none", **fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    {
        "FSDP 1": ({"fsdp": True, "fsdp_config": {"version": 1}}, "in version 2 only"),
        "FSDP2 with fp16": ({"fsdp": True, "fp16": True}, "set bf16=True"),
        "FSDP2 compiled": ({"fsdp": True, "torch_compile": True}, "torch_compile=True with FSDP2"),
    }.values(),
)
def test_what_fsdp_cannot_do_is_refused(tmp_path, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(tmp_path, **fields)


@pytest.mark.parametrize(
    ("zero", "fields", "sentence"),
    {
        "stage 0": ({"zero_optimization": {"stage": 0}}, {}, "stage 1, 2 or 3, got 0"),
        "fp16": (ZERO, {"fp16": True}, "fp16=True with DeepSpeed"),
        "compiled": (ZERO, {"torch_compile": True}, "torch_compile=True with DeepSpeed"),
        "on CPUs by mistake": (ZERO, {"use_cpu": False}, "set use_cpu=True"),
        "another clip": (
            {**ZERO, "gradient_clipping": 3.0}, {"max_grad_norm": 1.0}, "max_grad_norm=1.0",
        ),
        "other micro-steps": (
            {**ZERO, "gradient_accumulation_steps": 3}, {}, "gradient_accumulation_steps=3",
        ),
        "NaN applied": (
            {**ZERO, "bf16": {"check_grad_overflow": False}}, {}, "that is not finite",
        ),
        "tensor parallel": (
            {**ZERO, "tensor_parallel": {"autotp_size": 2}}, {}, "tensor_parallel is not",
        ),
    }.values(),
)  # fmt: skip
def test_what_deepspeed_cannot_do_is_refused(tmp_path, zero, fields, sentence):
    require_deepspeed()
    if not fields.get("use_cpu", True) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=sentence):
        RLOOConfig(str(tmp_path), deepspeed=zero, report_to="none", **{"use_cpu": True, **fields})


def test_deepspeed_counts_a_step_as_one_micro_batch_and_clips_as_asked(tmp_path):
    require_deepspeed()
    args = config(
        tmp_path, deepspeed=dict(ZERO), gradient_accumulation_steps=4, max_grad_norm=0.7,
        per_device_train_batch_size=2,
    )  # fmt: skip
    made = args.deepspeed_plugin.deepspeed_config
    assert made["gradient_accumulation_steps"] == 1
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_clipping"] == 0.7
    assert args.micro_steps_per_update == 4


def test_fsdp_that_accelerate_has_not_set_up_is_refused(monkeypatch):
    """Launched so in one process, or on CPUs, it would train unsharded without a word."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="several processes with a GPU each"):
        check_launch(Accelerator(), num_visible_gpus=0)


def test_only_hooks_of_the_package_are_left_out_for_a_while():
    calls = []
    linear = torch.nn.Linear(2, 2)

    def theirs(*_):
        calls.append("theirs")

    theirs.__module__ = "engine.hooks"
    linear.register_forward_pre_hook(theirs)
    linear.register_forward_hook(lambda *_: calls.append("ours"))
    with without_hooks(linear, "engine"):
        linear(torch.ones(2))
    assert calls == ["ours"]
    linear(torch.ones(2))
    assert calls == ["ours", "theirs", "ours"]


def test_hooks_come_back_in_their_order_after_an_error():
    linear, calls = torch.nn.Linear(2, 2), []
    for number in range(3):
        hook = lambda *_, n=number: calls.append(n)  # noqa: E731
        hook.__module__ = "engine" if number == 1 else "ours"
        linear.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="planted"), without_hooks(linear, "engine"):
        raise RuntimeError("planted")
    linear(torch.ones(2))
    assert calls == [0, 1, 2]


def test_a_forward_that_fails_leaves_the_module_as_it_was():
    linear = torch.nn.Linear(2, 2)

    def fail():
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        run_inside(linear, linear, fail)
    assert "forward" not in vars(linear)
    assert linear(torch.ones(2)).shape == (2,)


def test_evaluating_before_the_engine_holds_the_model_is_refused(tmp_path, tokenizer):
    args = config(tmp_path, max_completion_length=4, per_device_eval_batch_size=2)
    rows = Dataset.from_list([{"prompt": "w1", "answer": "w2"}] * 8)
    trainer = RLOOTrainer(
        make_model(), "exact_match", args, train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.parallel = FSDP2(trainer.accelerator)
    with pytest.raises(ValueError, match="set eval_on_start=True"):
        trainer.evaluate()
