"""What is refused, and how it is said."""

from __future__ import annotations

import pytest
from transformers import (
    AutoModelForCausalLM,
)

from rloo_fast.cli import train as cli_train
from tests.support.commands import THREE, parsed, recipe, refusal, tiny_llama


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--leraning_rate 1", "unknown option --leraning_rate: did you mean --learning_rate?"),
        ("--reward_model_name_or_path m", "a reward model goes to reward_funcs"),
        ("--learning_rate fast", "--learning_rate: expected a number, got 'fast'."),
        ("--num_generations 2.5", "--num_generations: expected an integer, got '2.5'."),
        ("--max_steps 1 2", "--max_steps: expected an integer, got 2 values: 1 2"),
        ("--max_steps", "--max_steps: expected an integer, got nothing."),
        ("--max_steps inf", "--max_steps: expected an integer, got 'inf'."),
        ("--bf16 maybe", "--bf16: expected true or false or none, got 'maybe'."),
        ("--no_bf16 1", "--no_bf16 takes no value, got 1."),
        ("--reward_clip_range a", "--reward_clip_range: expected a list of numbers or none"),
        ("--generation_kwargs {a:1}", "in double quotes at character 2)."),
        ("--generation_kwargs [1]", "expected a mapping such as '{\"key\": 1}' or none, got '[1]'"),
        ("--generation_kwargs no.json", "got 'no.json' (No such file or directory)."),
        ("--optim adamw_torc", "did you mean adamw_torch?"),
        ("--eval_strategy step", "expected one of no, steps, epoch, got 'step': did you mean"),
        ("--parallelism_config x", "it can be set in Python only."),
        ("--num_generations 1", "calculate the advantages, got 1."),
        ("--use_transformers_paged", "is not in this version. Set use_vllm=True"),
        ("--lora_r 4", "lora_r is set, but use_peft is not: write --use_peft."),
        ("--config no.yaml", "there is no file no.yaml"),
        ("--model_init_kwargs {\"dtype\":\"auto\"} --dtype auto", "dtype is in model_init_kwargs"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_line(capsys, trainers, words, sentence):
    assert sentence in refusal(capsys, *THREE, *words.split())
    assert trainers == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("beta: 0\nleraning_rate: 1",
         "unknown key 'leraning_rate' in recipe.yaml, line 2: did you mean 'learning_rate'?"),
        ("beta: 0\nmax_steps: ten", "line 2: max_steps: expected an integer, got 'ten'."),
        ("max_steps: true", "expected an integer, got bool True"),
        ("max_steps:", "expected an integer, got nothing (null)"),
        ("generation_kwargs: [1]", "got list [1]"),
        ("beta: 1\nbeta: 2", "recipe.yaml, line 2: the key 'beta' is there a second time."),
        ("beta: [1", "recipe.yaml, line 1, column 9: not valid YAML"),
        ("beta: 1\n---\nbeta: 2", "not valid YAML"),
        ("- beta", "expected a mapping, lines such as `learning_rate: 1e-6`, got a list."),
        ("config: other.yaml", "recipe.yaml: a recipe cannot name another one as config."),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_one_line(capsys, folder, text, sentence):
    assert sentence in refusal(capsys, *THREE, *recipe(folder, text))


def test_an_option_must_begin_with_dashes(capsys):
    assert refusal(capsys, "model") == "expected an option that begins with --, got 'model'."


@pytest.mark.parametrize("missing", [0, 2, 4])
def test_what_is_missing_is_shown_as_it_is_written(capsys, missing):
    argv = [word for i, word in enumerate(THREE) if i not in (missing, missing + 1)]
    line = refusal(capsys, *argv)
    assert line.startswith(f"missing: {THREE[missing]} ")
    assert line.count("--") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--model_name_or_path ./none", "model './none': there is no such directory."),
        ("--model_name_or_path cache", "holds no config.json"),
        ("--output_dir p.jsonl", "output_dir 'p.jsonl' cannot be written to"),
        ("--report_to wandbb", "report_to='wandbb' is not installed here"),
        ("--dataset_name q.jsonl", "there is no such file or directory (did you mean 'p.jsonl'?)"),
        ("--reward_funcs r.py:g", "no function 'g' there. Its functions: f."),
        ("--reward_funcs nowhere:f", "No module named 'nowhere'"),
        ("--reward_funcs accurac", "Did you mean 'accuracy'"),
        ("--reward_funcs cache", "holds no config.json"),
        (
            "--reward_weights 1 2",
            "Number of reward weights (2) must match number of reward functions (1)",
        ),
        ("--reward_funcs needs.py:f", "needs `gold`, but the dataset has no such column"),
        ("--reward_funcs runs.py:f", "write execute_model_code=True"),
        ('--reward_kwargs {"s.py:f":{}}', "reward_kwargs has 's.py:f', but reward_funcs has 'r.py"),
        ('--reward_kwargs {"r.py:f":{"a":1}}', "'r.py:f' takes no 'a'. It takes 'completions'."),
        ("--reward_funcs length", "missing 1 required positional argument: 'target'"),
        ("--reward_model_dtype int8", "must be auto, bfloat16, float16, float32, or left out"),
        ("--resume_from_checkpoint none_there", "is not a complete checkpoint"),
        ("--eval_strategy steps", "For evaluation name another file, as eval_dataset_name."),
        ("--eval_dataset_name p.jsonl", "eval_strategy is 'no': add --eval_strategy steps."),
    ],
)
def test_what_can_be_checked_is_checked_before_the_model(
    capsys, folder, monkeypatch, words, sentence
):
    loaded = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **_: loaded.append(a))
    (folder / "cache").mkdir()
    (folder / "needs.py").write_text("def f(completions, gold, **kwargs):\n    return [0.0]\n")
    (folder / "runs.py").write_text("def f(**kwargs): ...\nf.executes_model_code = True\n")
    assert sentence in refusal(capsys, *THREE, *words.split())
    assert not loaded


def test_a_reward_is_made_once(folder, capsys):
    """The trainer takes what the command has found, and does not look for it again."""
    (folder / "once.py").write_text(
        "class Reward:\n"
        "    def __init__(self):\n"
        "        print('made')\n"
        "    def __call__(self, completions, **kwargs):\n"
        "        return [0.0] * len(completions)\n"
    )
    model = ["--model_name_or_path", tiny_llama(folder / "tiny")]
    rest = ["--reward_funcs", "once.py:Reward", "--output_dir", "out", "--use_cpu"]
    trainer = cli_train.prepare(*parsed(*model, *rest))
    assert trainer.rewards.names == ["Reward"]
    assert capsys.readouterr().out.count("made") == 1


def test_a_model_that_the_hub_cannot_give_is_named(capsys):
    line = refusal(capsys, *THREE, "--model_name_or_path", "nobody/nothing")
    assert line.startswith("model 'nobody/nothing' cannot be loaded: ")
