"""The ready-made files: found by name, packed, read by their libraries, and launched for real."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rloo_fast import RLOOConfig, cli
from rloo_fast.cli.arguments import TrainArguments, build, gather
from rloo_fast.cli.options import UsageError, options_of
from rloo_fast.cli.recipe_files import FOLDER, path_of, recipes
from tests.support.cpu_engines import require_deepspeed
from tests.support.launch import HANGS_S, torchrun
from tests.support.paths import ROOT, SUPPORT, python_path
from tests.support.tiny import make_tokenizer

OPTIONS = options_of(TrainArguments, RLOOConfig)
ACCELERATE = [name for name in recipes() if name.startswith("accelerate/")]
DEEPSPEED = [name for name in recipes() if name.startswith("deepspeed/")]


# By name


def test_the_command_prints_the_path_of_a_file_and_the_names_of_all(capsys):
    assert cli.main(["recipe", "accelerate/fsdp2"]) == 0
    assert Path(capsys.readouterr().out.strip()) == FOLDER / "accelerate" / "fsdp2.yaml"
    assert cli.main(["recipe"]) == 0
    assert capsys.readouterr().out.split() == list(recipes())


def test_a_name_that_there_is_not_is_answered_with_the_nearest(capsys):
    with pytest.raises(UsageError, match="Did you mean deepspeed/zero3"):
        path_of("deepspeed/zero-3")
    assert cli.main(["train", "--deepspeed", "recipe:zero9"]) == 2
    assert "there is no recipe 'zero9'" in capsys.readouterr().err


def test_every_file_is_in_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    package = FOLDER.parent
    patterns = project["tool"]["setuptools"]["package-data"]["rloo_fast"]
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    assert {*FOLDER.rglob("*.*")} <= packed


def test_the_readme_names_every_file():
    told = (FOLDER / "README.md").read_text()
    assert [name for name in recipes() if f"`{name}`" not in told] == []


def test_a_recipe_is_a_value_on_the_command_line_and_in_a_recipe(tmp_path):
    given = gather(["--deepspeed", "recipe:deepspeed/zero2"], OPTIONS)
    assert given["deepspeed"] == json.loads(path_of("deepspeed/zero2").read_text())
    (tmp_path / "run.yaml").write_text("deepspeed: recipe:deepspeed/zero2\n")
    assert (
        gather(["--config", str(tmp_path / "run.yaml")], OPTIONS)["deepspeed"] == given["deepspeed"]
    )
    assert gather(["--config", "recipe:quickstart"], OPTIONS)["num_generations"] == 8


# What their libraries and RLOOConfig make of them


def launch_environment(name: str, *arguments: str) -> dict[str, str]:
    """What `accelerate launch --config_file <name>` would set for its processes."""
    command = ["--config_file", str(path_of(name)), *arguments, "-m", "rloo_fast"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # pyright: ignore
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    ours = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
    return {k: v for k, v in environment.items() if k.startswith(ours)}


@pytest.fixture
def config(tmp_path):
    """Make an RLOOConfig; what transformers remembers of its engine goes with it."""
    yield lambda **fields: RLOOConfig(str(tmp_path), use_cpu=True, report_to="none", **fields)
    unset_hf_deepspeed_config()


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_reads_it_and_the_config_agrees(name, config, monkeypatch):
    if "zero" in name:
        require_deepspeed()
    for key, value in launch_environment(name).items():
        monkeypatch.setenv(key, value)
    args = config()
    assert args.bf16 is False  # not decided by the launcher
    if "zero" in name:
        plugin = args.deepspeed_plugin
        assert plugin.deepspeed_config["zero_optimization"]["stage"] == int(name[-1])
        assert plugin.deepspeed_config["gradient_accumulation_steps"] == 1
    elif "fsdp2" in name:
        from accelerate.utils import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
        assert not plugin.activation_checkpointing


def test_hybrid_sharding_is_over_machines_times_their_gpus(monkeypatch):
    name = "accelerate/fsdp2_hybrid"
    for key, value in launch_environment(name).items():
        monkeypatch.setenv(key, value)
    sizes = ParallelismConfig()
    assert sizes.fsdp_dim_names == ["dp_replicate", "dp_shard_cp"]
    assert f"num_processes: {sizes.total_size} " in path_of(name).read_text()


def test_a_launcher_s_tensor_parallelism_is_refused(config, monkeypatch):
    tensor = ["--parallelism_config_tp_size", "2"]
    for key, value in launch_environment("accelerate/fsdp2_hybrid", *tensor).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match="set dp_replicate_size and dp_shard_size only"):
        config()


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_reads_it_and_gradients_are_summed_in_float32(name, config):
    require_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig  # pyright: ignore[reportMissingImports]

    args = config(deepspeed=str(path_of(name)), bf16=True)
    found = DeepSpeedConfig(args.deepspeed_plugin.deepspeed_config)
    assert found.bfloat16_config.enabled
    assert found.communication_data_type == torch.float32
    stage = int(name.removeprefix("deepspeed/zero")[0])
    assert found.zero_config.stage == stage
    # with stage 1 DeepSpeed has another optimizer for it, which does not give the gradient's norm
    assert found.grad_accum_dtype == (None if stage == 1 else "fp32")
    assert found.zero_config.zero_hpz_partition_size == (8 if "hybrid" in name else 1)


def test_fsdp_is_asked_for_on_the_command_line():
    three = ["--model_name_or_path", "m", "--dataset_name", "d", "--reward_funcs", "r:f"]
    version = ["--fsdp_config", '{"version": 2}']
    _, args = build(gather([*three, "--use_cpu", "--fsdp", *version], OPTIONS))
    assert args.fsdp_plugin_args["fsdp_version"] == 2


# Launched


ARGUMENTS = shlex.split("""
--model_name_or_path model --dataset_name p.jsonl --reward_funcs r.py:f --max_completion_length 8
--num_generations 4 --max_steps 4 --logging_steps 1 --learning_rate 1e-2 --optim sgd --beta 0.1
--gradient_checkpointing false --report_to none --save_strategy no --disable_tqdm --use_cpu
""")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, prompts and a reward function, and what one process makes of them in one/."""
    folder = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=None, eos_token_id=1, initializer_range=0.2,
        tie_word_embeddings=True,  # ZeRO-3 prefetches the embedding while the lm_head needs it
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    prompts = [" ".join(f"w{(i * 7 + j) % 26}" for j in range(1 + i % 5)) for i in range(32)]
    (folder / "p.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    (folder / "r.py").write_text(
        "def f(completion_ids, **_):\n    return [sum(ids) % 7 / 3 - 1 for ids in completion_ids]\n"
    )
    with contextlib.chdir(folder):
        one = ["--per_device_train_batch_size", "8", "--output_dir", "one"]
        assert cli.main(["train", *ARGUMENTS, *one]) == 0
    return folder


def start(folder: Path, command: list[str]) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=HANGS_S
    )
    assert done.returncode == 0, done.stderr[-3000:]


def assert_equal(found: Path, one: Path) -> None:
    weights = load_file(found / "model.safetensors")
    for name, weight in load_file(one / "model.safetensors").items():
        assert (weights[name] - weight).norm() <= 1e-5 * weight.norm(), name


PER_PROCESS = ["--per_device_train_batch_size", "4"]


@pytest.mark.slow
@pytest.mark.distributed
def test_accelerate_launch_of_two_processes_equals_one(folder):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(path_of("accelerate/ddp"))]
    launcher += ["--num_processes", "2", "--main_process_port", "0"]
    train = ["-m", "rloo_fast", "train", *ARGUMENTS, *PER_PROCESS, "--output_dir", "ddp"]
    start(folder, [sys.executable, *launcher, *train])
    assert_equal(folder / "ddp", folder / "one")


@pytest.mark.slow
@pytest.mark.distributed
def test_fsdp2_and_zero3_of_two_processes_equal_one(folder):
    require_deepspeed()
    environment = json.dumps(launch_environment("accelerate/fsdp2"))
    worker = [str(SUPPORT / "recipes_worker.py"), ".", environment, *ARGUMENTS, *PER_PROCESS]
    start(folder, [*torchrun(2), *worker])
    assert_equal(folder / "fsdp2", folder / "one")
    assert_equal(folder / "zero3", folder / "one")
