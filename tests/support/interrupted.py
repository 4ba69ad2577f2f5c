"""Runs that are stopped, resumed and compared; saves that fail; what the best checkpoint is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, TrainerCallback

from tests.support.kill_resume import metrics_of, without_times
from tests.support.tiny import make_model


class Crash(Exception):
    pass


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


def assert_same_but_for_the_queue(synchronous: Any, queued: Any) -> None:
    """The same, of a run by the queue, whose own figures are left out."""
    for row in queued.state.log_history:
        for name in [name for name in row if name.startswith("async/")]:
            del row[name]
    path = Path(queued.args.output_dir) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert any("async/queued" in line for line in lines)
    kept = [{name: x for name, x in line.items() if "async/" not in name} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert_same_run(synchronous, queued)


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


def adapted_model() -> Any:
    from peft import get_peft_model

    return get_peft_model(make_model(), lora())  # pyright: ignore


# whose saved weights have other names, or are cut otherwise, than those in memory
def renamed_head(**overrides: Any) -> Any:
    return make_other(GPTNeoXForCausalLM, GPTNeoXConfig, intermediate_size=64, **overrides)


def make_other(model: Any, config: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": 1}
    return model(config(**{**sizes, **ids, "initializer_range": 0.2, **fields}))


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


def block_saves(output_dir: Path, steps: range) -> At:
    """A plain file lies where checkpoints are written, while `steps` run."""

    def action(step: int) -> None:
        path = output_dir / ".incomplete"
        if step in steps:
            path.write_text("")
        else:
            path.unlink(missing_ok=True)

    return At(action)
