"""The recipes, each as the command runs it, on a stand-in of its models and data: scores rise.

`python -m tests.end_to_end.test_recipe_runs [NAME ...]` prints the table. A score is a reward
less the penalty of a missing EOS.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rloo_fast import cli
from rloo_fast.models.merge import merge_adapter
from rloo_fast.reports.metrics_file import read_metrics
from tests.support.recipe_images import make_clevr
from tests.support.recipe_standins import make_mbpp, make_sentiment, make_tldr

pytestmark = pytest.mark.slow

SMALL = "--use_cpu --report_to none --disable_tqdm --logging_steps 1 --seed 1 --save_strategy no"
SENTIMENT = (
    "--model_name_or_path {base} --merge_adapter {adapter} --reward_funcs {reward} "
    "--dataset_name {data} --dataset_train_split train[:60] --max_completion_length 12 "
    "--max_steps 10 --learning_rate 5e-3 --save_strategy steps --save_steps 5"
)
UNTRAINED = '{{"rloo_fast.rewards.untrained:UntrainedHead": {{"model": "{sft}"}}}}'
# run: (what makes its stand-in, what replaces paths and sizes, the least rise of the score)
RUNS: dict[str, tuple[Callable[[Path], dict[str, str]], str, float]] = {
    "tldr": (
        make_tldr,
        "--sft_model_path {sft} --reward_model_path {reward} --model_name_or_path {tokenizer} "
        "--dataset_name {data} --dataset_test_split validation --max_prompt_length 64 "
        "--max_completion_length 12 --per_device_train_batch_size 8 "
        "--gradient_accumulation_steps 2 --max_steps 48 --learning_rate 3e-4",
        0.7,
    ),
    "sentiment": (make_sentiment, SENTIMENT, 0.7),
    "sentiment --variant grpo": (make_sentiment, SENTIMENT, 0.2),
    "mbpp": (
        make_mbpp,
        "--model_name_or_path {model} --dataset_name {data} --execute_model_code --max_steps 16 "
        "--max_completion_length 32 --per_device_train_batch_size 32 "
        "--gradient_accumulation_steps 1 --learning_rate 2e-3",
        0.1,
    ),
    "vision": (
        make_clevr,
        "--model_name_or_path {model} --dataset_name {data} --dataset_train_split train[:400] "
        "--dtype float32 --max_completion_length 2 --per_device_train_batch_size 64 "
        "--gradient_accumulation_steps 1 --max_steps 40 --learning_rate 5e-3 --warmup_steps 0",
        0.2,
    ),
    "smoke_2024": (
        make_tldr,
        f"--model_name_or_path {{sft}} --reward_kwargs '{UNTRAINED}' --dataset_name {{data}} "
        "--dataset_train_split train[:36] --max_completion_length 5 --max_steps 40 "
        "--per_device_train_batch_size 32 --learning_rate 1e-3",
        0.3,
    ),
}


class Run:
    """One recipe's run: its stand-in, its directory, the metrics of every generation batch."""

    def __init__(self, name: str, folder: Path):
        make, options, _ = RUNS[name]
        stand_in = folder / make.__name__
        if not stand_in.exists():
            stand_in.mkdir()
            (stand_in / "paths.json").write_text(json.dumps(make(stand_in)))
        self.paths = json.loads((stand_in / "paths.json").read_text())
        self.out = folder / name.replace(" --variant ", "_")
        words = shlex.split(f"--config recipe:{name} {SMALL} {options.format(**self.paths)}")
        start = time.process_time()
        assert cli.main(["train", *words, "--output_dir", str(self.out)]) == 0
        self.seconds = time.process_time() - start
        self.rows = [row for row in read_metrics(self.out) if "objective/scores" in row]
        scores = [row["objective/scores"] for row in self.rows]
        self.first, self.last = mean(scores[:3]), mean(scores[-3:])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Every run is made once, by name."""
    folder, made = tmp_path_factory.mktemp("recipes"), {}

    def of(name: str) -> Run:
        if name not in made:
            made[name] = Run(name, folder)
        return made[name]

    return of


@pytest.mark.parametrize("name", RUNS)
def test_the_score_rises(name, run):
    found = run(name)
    assert found.last - found.first > RUNS[name][2]


def test_the_flags_of_2024_name_policy_reward_and_tokenizer(run):
    found = run("tldr")
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).get_output_embeddings().weight
        for path in (found.paths["sft"], found.out)
    )
    assert 0 < (after - before).abs().max() < 0.1  # trained from that model
    assert AutoTokenizer.from_pretrained(found.out).eos_token == "<|endoftext|>"
    assert "rewards/reward/mean" in found.rows[0]


@pytest.mark.parametrize("name", ["sentiment", "sentiment --variant grpo"])
def test_checkpoints_hold_the_adapter_alone_which_loads_on_the_sum(name, run):
    found = run(name)
    for folder in (found.out, found.out / "checkpoint-10"):
        assert not (folder / "model.safetensors").exists()
        base = AutoModelForCausalLM.from_pretrained(found.paths["base"])
        model = PeftModel.from_pretrained(merge_adapter(base, found.paths["adapter"]), folder)
        trained = [name for name, w in model.named_parameters() if "lora_B" in name and w.any()]
        assert {name.split(".")[-4] for name in trained} == {
            "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
        }  # fmt: skip


def test_a_run_starts_from_the_sum_with_the_adapter(run):
    """The base model alone writes negative reviews only: -1.7 at the first step."""
    assert run("sentiment").rows[0]["reward"] > -1.4


def test_dropout_clips_no_ratio_and_makes_no_kl_before_the_first_update(run):
    rows = run("sentiment").rows
    assert rows[0]["kl"] == 0
    assert {row["clip_ratio/region_mean"] for row in rows} == {0}


def test_the_adapter_of_the_vision_recipe_is_in_the_image_tower_too(run):
    with safe_open(run("vision").out / "adapter_model.safetensors", "pt") as file:
        trained = {name for name in file.keys() if file.get_tensor(name).any()}  # noqa: SIM118
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(part in name and "lora_B" in name for name in trained), part


def main() -> None:
    torch.set_num_threads(1)
    print("| recipe | batches | score, first 3 -> last 3 | CPU s |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or RUNS:
            run = Run(name, Path(folder))
            scores = f"{run.first:.3f} -> {run.last:.3f}"
            print(f"| {name} | {len(run.rows)} | {scores} | {run.seconds:.0f} |")


if __name__ == "__main__":
    main()
