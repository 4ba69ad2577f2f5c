"""What the sync benchmarks send, and how they ask the engine for samples of it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import models as step_models
from benchmarks.rollout.providers import SHAPES
from rloo_fast.records import Sampling
from rloo_fast.rollout import RolloutEngine
from rloo_fast.rollout.engine import EngineState

POLICIES = ("full", "lora")
SHAPE = SHAPES["short"]
PROMPTS = [list(range(3 + i, 3 + i + SHAPE.prompt)) for i in range(SHAPE.num_rows)]
SAMPLING = Sampling(
    temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0,
    max_new_tokens=SHAPE.limit, stop_token_ids=(),
)  # fmt: skip


def make_policy(name: str, policy: str) -> Any:
    """`name` of step_models, in fp32; `lora`: with adapters on every linear layer but the head."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(step_models.model_config(name)).eval()
    if policy == "full":
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


@torch.no_grad()
def change(policy: Any) -> None:
    """New values in every parameter: one that a sync leaves out is not what it should be."""
    for parameter in policy.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))


def wake_weights(engine: RolloutEngine) -> None:
    """Leave the engine as it is when weights are loaded, whatever it was."""
    if engine.state is not EngineState.ASLEEP:
        engine.sleep(0)
    engine.wake(("weights",))
