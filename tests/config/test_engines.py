"""Settings of the training engines that are refused, and those that are made to agree."""

from __future__ import annotations

import pytest
import torch

from rloo_fast import RLOOConfig
from tests.support.cpu_engines import require_deepspeed

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
