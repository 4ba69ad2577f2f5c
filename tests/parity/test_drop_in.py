"""TRL 1.16's own training script, with nothing changed but where RLOOTrainer and RLOOConfig come
from, trains on a conversational dataset with a custom reward function."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.support.tiny import CHAT_TEMPLATE, make_tokenizer

REWARD = """
def prefers_w1(prompts, completions, topic, trainer_state=None, log_metric=None, **kwargs):
    assert prompts[0][-1]["role"] == "user" and completions[0][0]["role"] == "assistant"
    assert len(topic) == len(completions) and trainer_state.max_steps == 3
    log_metric("topics", len(set(topic)))
    return [float(c[0]["content"].split().count("w1")) for c in completions]
"""


@pytest.fixture
def workplace(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, size in (("train", 16), ("test", 4)):
        rows = [
            {"prompt": [{"role": "user", "content": f"w{i} w{i + 3}"}], "topic": i % 4}
            for i in range(size)
        ]
        text = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / "data" / f"{split}.jsonl").write_text(text)
    (tmp_path / "my_rewards.py").write_text(REWARD)
    return tmp_path


def script_of_trl() -> str:
    import trl.scripts.rloo

    return Path(trl.scripts.rloo.__file__).read_text()


def with_our_import(script: str) -> str:
    changed = script.replace(
        "from trl import RLOOTrainer, get_dataset",
        "from rloo_fast import RLOOTrainer\n    from trl import get_dataset",
    ).replace(
        "from trl import DatasetMixtureConfig, ModelConfig, RLOOConfig, TrlParser",
        "from rloo_fast import RLOOConfig\n    from trl import DatasetMixtureConfig, "
        "ModelConfig, TrlParser",
    )
    assert changed.count("from rloo_fast import") == 2
    return changed


@pytest.mark.slow
def test_trls_script_runs_with_the_import_changed(workplace):
    (workplace / "train.py").write_text(with_our_import(script_of_trl()))
    options = {
        "model_name_or_path": "model", "dataset_name": "data", "output_dir": "out",
        "reward_funcs": "my_rewards.prefers_w1", "num_generations": 4, "max_steps": 3,
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
        "max_completion_length": 8, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3,
        "save_steps": 2, "use_cpu": "true", "bf16": "false", "report_to": "none", "beta": 0.1,
        "learning_rate": 1e-3,
    }  # fmt: skip
    command = [sys.executable, "train.py"]
    command += [f"--{name}={value}" for name, value in options.items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=workplace, env=env, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Training completed" in done.stdout
    state = json.loads((workplace / "out/checkpoint-3/trainer_state.json").read_text())
    logged = {key for row in state["log_history"] for key in row}
    assert {"rewards/prefers_w1/mean", "kl", "eval_reward", "topics"} <= logged
    trained = AutoModelForCausalLM.from_pretrained(workplace / "out")
    start = AutoModelForCausalLM.from_pretrained(workplace / "model")
    assert not trained.lm_head.weight.equal(start.lm_head.weight)
