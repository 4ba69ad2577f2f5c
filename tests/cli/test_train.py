"""What reaches the trainer."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import yaml

from rloo_fast import cli
from rloo_fast.cli import train as cli_train
from rloo_fast.cli.arguments import TrainArguments
from rloo_fast.config.rloo_config import RLOOConfig
from tests.support.commands import THREE, FakeTrainer, parsed, recipe, refusal, tiny_llama


def run(*argv: str) -> int:
    return cli.main(["train", *THREE, *argv])


def test_the_trainer_gets_model_rewards_prompts_and_configuration(trainers):
    assert run("--beta", "0.1", "--output_dir", "out") == 0
    arguments = trainers[0].arguments
    assert arguments["model"] == "model"
    assert [source.name for source in arguments["reward_funcs"].sources] == ["f"]
    assert arguments["train_dataset"].column_names == ["prompt", "answer"]
    assert (arguments["args"].beta, arguments["args"].output_dir) == (0.1, "out")
    assert (arguments["eval_dataset"], arguments["peft_config"]) == (None, None)


def test_a_recipe_alone_is_enough(folder, trainers):
    text = yaml.safe_dump(
        {"model_name_or_path": "model", "dataset_name": "p.jsonl", "reward_funcs": "r.py:f"}
    )
    assert cli.main(["train", *recipe(folder, text)]) == 0
    assert trainers[0].arguments["model"] == "model"


def test_a_module_in_the_current_directory_is_found(folder, trainers):
    (folder / "beside_me.py").write_text("def g(completions, **kwargs):\n    return [1.0]\n")
    assert run("--reward_funcs", "beside_me:g", "exact_match") == 0
    sources = trainers[0].arguments["reward_funcs"].sources
    assert [source.name for source in sources] == ["g", "exact_match"]


def test_the_model_is_saved_and_the_last_line_says_where(trainers, capsys):
    run("--output_dir", "out")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == "The model is in out (7 steps, reward 0.5, 1234 completion tokens/s)."
    assert trainers[0].calls["save_model"] == (("out",), {"_internal_call": True})


def test_a_last_checkpoint_that_is_not_in_its_place_ends_with_status_1(trainers, monkeypatch):
    monkeypatch.setattr(FakeTrainer, "failed_step", 7)
    assert run("--output_dir", "out") == 1
    assert "save_model" in trainers[0].calls


def test_the_model_is_saved_and_said_before_it_is_pushed(trainers, monkeypatch, capsys):
    def push(self) -> None:
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(FakeTrainer, "push_to_hub", push, raising=False)
    assert run("--output_dir", "out", "--push_to_hub", "true") == 1
    printed = capsys.readouterr()
    assert "The model is in out" in printed.out
    assert "no route to the Hub" in printed.err


def test_only_the_main_process_speaks(capsys):
    cli_train._say(SimpleNamespace(process_index=1), "line")
    assert capsys.readouterr().out == ""


def test_ways_to_load_the_model_become_model_init_kwargs(trainers):
    run("--dtype", "bfloat16", "--attn_implementation", "eager", "--model_revision", "v1")
    expected = {"dtype": "bfloat16", "attn_implementation": "eager", "revision": "v1"}
    assert trainers[0].arguments["args"].model_init_kwargs == expected


def test_use_peft_makes_a_lora_config(trainers):
    run("--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj")
    config = trainers[0].arguments["peft_config"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 32, 0.0)
    assert config.target_modules == {"q_proj", "v_proj"}


def test_adapters_go_to_all_linear_layers_by_default(trainers):
    run("--use_peft")
    assert trainers[0].arguments["peft_config"].target_modules == "all-linear"


@pytest.mark.parametrize(("words", "log_format"), [([], "line"), (["--log_format=dict"], "dict")])
def test_a_log_is_a_line_unless_asked_otherwise(trainers, words, log_format):
    run(*words)
    assert trainers[0].arguments["args"].log_format == log_format


def checkpoint(folder, step: int) -> None:
    """What is looked for in a complete checkpoint, in out/."""
    directory = folder / f"out/checkpoint-{step}"
    directory.mkdir(parents=True)
    for name in ("trainer_state.json", "rloo_launch.json"):
        (directory / name).write_text("{}")


def test_resuming_without_a_checkpoint_starts_anew_and_says_so(trainers, capsys):
    run("--output_dir", "out", "--resume_from_checkpoint", "true")
    assert trainers[0].calls["train"] == ((), {"resume_from_checkpoint": None})
    assert "No checkpoint in out yet: starting from the beginning." in capsys.readouterr().out


@pytest.mark.parametrize("wanted", ["true", "last", "out/checkpoint-9"])
def test_resuming_takes_the_newest_or_the_named_checkpoint(folder, trainers, wanted):
    for step in (9, 10):
        checkpoint(folder, step)
    run("--output_dir", "out", "--resume_from_checkpoint", wanted)
    expected = wanted if "/" in wanted else "out/checkpoint-10"
    assert trainers[0].calls["train"] == ((), {"resume_from_checkpoint": expected})


def test_a_checkpoint_without_adapters_is_not_resumed_with_them(folder, capsys):
    checkpoint(folder, 9)
    line = refusal(
        capsys, *THREE, "--output_dir", "out", "--use_peft", "--resume_from_checkpoint", "true"
    )
    assert "checkpoint-9 was saved without adapters" in line


def test_the_evaluation_split_of_a_directory_is_test(folder, trainers):
    (folder / "d").mkdir()
    (folder / "d/train.jsonl").write_text('{"prompt": "w1"}\n')
    (folder / "d/test.jsonl").write_text('{"prompt": "w2"}\n')
    run("--dataset_name", "d", "--eval_strategy", "steps")
    assert trainers[0].arguments["train_dataset"]["prompt"][:] == ["w1"]
    assert trainers[0].arguments["eval_dataset"]["prompt"][:] == ["w2"]


def test_a_file_can_be_the_evaluation_set(folder, trainers):
    (folder / "e.csv").write_text("prompt,answer\nw5,1\n")
    run("--eval_strategy", "steps", "--eval_dataset_name", "e.csv")
    assert trainers[0].arguments["eval_dataset"][0] == {"prompt": "w5", "answer": "1"}


def test_a_test_split_that_is_not_evaluated_on_is_said(trainers, capsys):
    assert run("--dataset_test_split", "validation") == 0
    assert trainers[0].arguments["eval_dataset"] is None
    assert "dataset_test_split is not used: eval_strategy is 'no'." in capsys.readouterr().out


def test_a_task_is_evaluated_on_other_items_than_it_is_trained_on():
    small = {"min_terms": 2, "max_terms": 2, "max_digits": 1}  # few sums there are, many repeat
    script, config = parsed(
        "--dataset_name", "reasoning_gym:chain_sum", "--eval_strategy", "steps",
        "--dataset_size", "40", "--eval_dataset_size", "30", "--dataset_config", json.dumps(small),
    )  # fmt: skip
    train, evaluation = cli_train.load_datasets(script, config)
    assert (len(train), len(evaluation)) == (40, 30)
    assert {*train["prompt"]} & {*evaluation["prompt"]} == set()


def test_a_task_can_be_evaluated_on_a_file(folder):
    script, config = parsed(
        "--dataset_name", "reasoning_gym:chain_sum", "--dataset_size", "4", "--eval_strategy",
        "steps", "--dataset_config", '{"max_terms": 2}', "--eval_dataset_name", "p.jsonl",
    )  # fmt: skip
    train, evaluation = cli_train.load_datasets(script, config)
    assert len(train) == 4
    assert evaluation["answer"][:] == ["w3"] * 8


def test_two_steps_end_to_end(folder, capsys):
    length = "def f(completions, **kwargs):\n    return [-float(len(c)) for c in completions]\n"
    (folder / "r.py").write_text(length)
    argv = recipe(folder, "max_completion_length: 5\nlogging_steps: 1\nmax_steps: 9\nuse_cpu: true")
    words = [
        tiny_llama(folder / "llama"),
        *argv,
        "--output_dir",
        "out",
        "--max_steps",
        "2",
        "--disable_tqdm",
    ]
    assert cli.main(["train", *THREE, "--model_name_or_path", *words]) == 0
    rows = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2]
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in (folder / "out").iterdir()
    }
    lines = capsys.readouterr().out.splitlines()
    printed = [line for line in lines if not line.startswith("[")]  # DeepSpeed logs there, too
    assert printed[0].startswith("step 1/2  reward ")
    assert printed[-1].startswith("The model is in out (2 steps, reward -")


def test_train_arguments_and_rloo_config_share_no_name():
    mine = {field.name for field in dataclasses.fields(TrainArguments)}
    assert mine & {field.name for field in dataclasses.fields(RLOOConfig)} == set()


def test_quantised_weights_are_held_as_asked_for(trainers, monkeypatch):
    # bitsandbytes itself is not needed to say what it is asked for
    monkeypatch.setattr(cli_train, "find_spec", lambda name: object())
    monkeypatch.setattr("transformers.BitsAndBytesConfig", lambda **kwargs: kwargs)
    assert run("--use_peft", "--load_in_4bit", "--dtype", "bfloat16", "--use_bnb_nested_quant") == 0
    assert run("--use_peft", "--load_in_8bit") == 0
    assert [trainer.arguments["quantization_config"] for trainer in trainers] == [
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        },
        {"load_in_8bit": True},
    ]


def test_why_weights_cannot_be_quantised(capsys, monkeypatch):
    monkeypatch.setattr(cli_train, "find_spec", lambda name: None)
    said = {
        ("--load_in_4bit",): "add --use_peft",
        ("--load_in_4bit", "--load_in_8bit", "--use_peft"): "write one of them",
        ("--load_in_8bit", "--use_peft"): "needs bitsandbytes, which is not installed",
    }
    for options, sentence in said.items():
        assert run(*options) == 2
        assert sentence in capsys.readouterr().err
