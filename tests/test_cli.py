"""The command line: what is parsed, what is refused and how, what reaches the trainer."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import datasets
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rloo_fast import cli
from rloo_fast.cli import train as cli_train
from rloo_fast.cli.arguments import TrainArguments, build, gather
from rloo_fast.cli.help import SECTIONS
from rloo_fast.cli.options import UsageError, convert, options_of
from rloo_fast.config import RLOOConfig

OPTIONS = options_of(TrainArguments, RLOOConfig)
THREE = ["--model_name_or_path", "model", "--dataset_name", "p.jsonl", "--reward_funcs", "r.py:f"]


class FakeTrainer:
    """Records how it was made and called; stands in where no model is to be loaded."""

    made: list[FakeTrainer]

    def __init__(self, **arguments):
        self.arguments, self.calls, self.callbacks = arguments, {}, []
        log = [{"reward": 0.25}, {"reward": 0.5, "throughput/completion_tokens_per_s": 1234.4}]
        self.state = SimpleNamespace(global_step=7, log_history=[*log, {"train_loss": 0.0}])
        self.accelerator = SimpleNamespace(end_training=lambda: None)
        self.made.append(self)

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.__setitem__(name, (args, kwargs))

    def add_callback(self, callback):
        self.callbacks.append(callback)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current directory, with a model's config, prompts and a reward function."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command puts the directory there
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "r.py").write_text("def f(completions, **kwargs):\n    return [0.0] * 4\n")
    rows = [{"prompt": f"w{i} w2", "answer": "w3"} for i in range(8)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def trainers(monkeypatch):
    """The FakeTrainers that a command made."""
    FakeTrainer.made = []
    monkeypatch.setattr("rloo_fast.trainer.RLOOTrainer", FakeTrainer)
    return FakeTrainer.made


def parsed(*argv: str) -> tuple[TrainArguments, RLOOConfig]:
    return build(gather([*THREE, *argv], OPTIONS))


def recipe(folder, text: str) -> list[str]:
    (folder / "recipe.yaml").write_text(text)
    return ["--config", "recipe.yaml"]


def refusal(capsys, *argv: str) -> str:
    """The one line that `rloo-fast train` ends with for wrong arguments."""
    capsys.readouterr()
    assert cli.main(["train", *argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("rloo-fast: error: ")


# --- the command itself ---------------------------------------------------------------------------


def test_help_and_version_import_no_torch():
    code = "import sys, rloo_fast.cli as c; c.main([]); c.main(['--version'])"
    code += "; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_it_runs_as_a_module():
    run = [sys.executable, "-m", "rloo_fast", "--version"]
    assert subprocess.check_output(run, text=True).startswith("rloo-fast 0.")


def test_no_arguments_print_the_commands(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in cli.COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "Did you mean train?" in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("RLOO_FAST_DEBUG", "1")
    with pytest.raises(UsageError, match="num_generations") as caught:
        cli.main(["train", *THREE, "--num_generations", "1"])
    assert isinstance(caught.value.__cause__, ValueError)


def test_errors_of_other_processes_say_which(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    cli.main(["train"])
    assert "error (process 3): missing" in capsys.readouterr().err


# --- help -----------------------------------------------------------------------------------------


def test_train_help_fits_a_screen_and_a_terminal(capsys):
    assert cli.main(["train", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 62
    assert max(map(len, lines)) <= 100


def test_train_help_shows_sections_defaults_and_the_way_to_the_rest(capsys):
    cli.main(["train", "--help"])
    printed = capsys.readouterr().out
    assert all(f"\n{section}:" in printed for section in SECTIONS)
    assert "[1e-06]" in printed
    assert "--help all" in printed


def test_help_all_lists_every_option_that_does_something(capsys):
    cli.main(["train", "--help", "all"])
    printed = capsys.readouterr().out
    offered = {name for name, o in OPTIONS.items() if o.help != "Not offered yet."}
    assert {name for name in offered if f"\n  --{name}:" not in printed} == set()
    assert "--use_transformers_paged" not in printed


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.name)
def test_every_default_is_a_value_the_option_takes(option):
    default = getattr(option.default, "value", option.default)
    assert convert(option, default) == default


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--learning_rate -1e-3", "learning_rate", -1e-3),
        ("--learning-rate=3e-6", "learning_rate", 3e-6),
        ("--reward_clip_range -1 1", "reward_clip_range", [-1.0, 1.0]),
        ("--reward_clip_range 5", "reward_clip_range", [5.0]),
        ("--reward_weights 1 0.5", "reward_weights", [1.0, 0.5]),
        ("--normalize_advantages", "normalize_advantages", True),
        ("--normalize_advantages false", "normalize_advantages", False),
        ("--bf16 false", "bf16", False),
        ("--bf16 none", "bf16", None),
        ("--no_shuffle_dataset", "shuffle_dataset", False),
        ("--no-gradient-checkpointing", "gradient_checkpointing", False),
        ("--max_steps 1e3", "max_steps", 1000),
        ("--seed 9007199254740993", "seed", 2**53 + 1),
        ("--max_steps 5 --max_steps 6", "max_steps", 6),
        ("--pad_to_multiple_of 8", "pad_to_multiple_of", 8),
        ("--pad_to_multiple_of auto", "pad_to_multiple_of", "auto"),
        ("--report_to none", "report_to", "none"),
        ("--report_to wandb trackio", "report_to", ["wandb", "trackio"]),
        ("--lr_scheduler_type cosine", "lr_scheduler_type", "cosine"),
        ("--resume_from_checkpoint", "resume_from_checkpoint", "true"),
        ("--resume_from_checkpoint a/b", "resume_from_checkpoint", "a/b"),
        ("--trackio_static_space_id false", "trackio_static_space_id", False),
        ('--generation_kwargs {"no_repeat_ngram_size":3}', "generation_kwargs",
         {"no_repeat_ngram_size": 3}),
        ("--dataset_config {}", "dataset_config", {}),
    ],
)  # fmt: skip
def test_a_command_line_value_gets_its_type(words, name, value):
    given = gather([*THREE, *words.split()], OPTIONS)[name]
    assert (given, type(given)) == (value, type(value))


def test_a_mapping_can_be_a_json_file(folder):
    (folder / "g.json").write_text('{"top_k": 3}')
    assert parsed("--generation_kwargs", "g.json")[1].generation_kwargs == {"top_k": 3}


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 1e-6", "learning_rate", 1e-6),  # text in YAML 1.1
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_steps: '12'", "max_steps", 12),
        ("eval_strategy: no", "eval_strategy", "no"),  # False in YAML 1.1
        ("bf16: null", "bf16", None),
        ("run_name: 7", "run_name", "7"),
        ("reward_clip_range: 5", "reward_clip_range", [5.0]),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "true"),
        ("generation_kwargs:\n  top_k: 3", "generation_kwargs", {"top_k": 3}),
        ("reward_funcs: [a:b, c:d]", "reward_funcs", ["a:b", "c:d"]),
        ("reward_funcs: a:b", "reward_funcs", ["a:b"]),
    ],
)
def test_a_recipe_value_gets_its_type(folder, line, name, value):
    given = gather(recipe(folder, line), OPTIONS)[name]
    assert (given, type(given)) == (value, type(value))


def test_the_command_line_wins_over_the_recipe(folder):
    argv = recipe(folder, "learning_rate: 1e-4\nmax_steps: 5\n")
    _, config = parsed(*argv, "--learning_rate", "2e-4")
    assert (config.learning_rate, config.max_steps) == (2e-4, 5)


@pytest.mark.parametrize(
    ("line", "words", "field", "value"),
    [
        ("beta: 0.03", "--kl_coef 0.1", "beta", 0.1),
        ("rloo_k: 4", "--num_generations 8", "num_generations", 8),
        ("total_episodes: 100000", "--max_steps 2", "max_steps", 2),
    ],
)
def test_it_wins_under_the_other_name_too(folder, line, words, field, value):
    _, config = parsed(*recipe(folder, line), *words.split())
    assert getattr(config, field) == value


# --- what is refused ------------------------------------------------------------------------------


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
        ("--num_generations 1", "num_generations must be >= 2 for a leave-one-out baseline, got 1"),
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
        ("--reward_weights 1 2", "reward_weights: 2 numbers for 1 reward_funcs"),
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
def test_what_can_be_checked_is_checked_before_the_model(capsys, folder, trainers, words, sentence):
    (folder / "cache").mkdir()
    (folder / "needs.py").write_text("def f(completions, gold, **kwargs):\n    return [0.0]\n")
    (folder / "runs.py").write_text("def f(**kwargs): ...\nf.executes_model_code = True\n")
    assert sentence in refusal(capsys, *THREE, *words.split())
    assert trainers == []


def test_a_model_that_the_hub_cannot_give_is_named(capsys):
    line = refusal(capsys, *THREE, "--model_name_or_path", "nobody/nothing")
    assert line.startswith("model 'nobody/nothing': ")


# --- what reaches the trainer ---------------------------------------------------------------------


def run(*argv: str) -> int:
    return cli.main(["train", *THREE, *argv])


def test_the_trainer_gets_model_rewards_prompts_and_configuration(trainers):
    assert run("--beta", "0.1", "--output_dir", "out") == 0
    arguments = trainers[0].arguments
    assert arguments["model"] == "model"
    assert arguments["reward_funcs"] == ["r.py:f"]
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
    assert trainers[0].arguments["reward_funcs"] == ["beside_me:g", "exact_match"]


def test_the_model_is_saved_and_the_last_line_says_where(trainers, capsys):
    run("--output_dir", "out")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == "The model is in out (7 steps, reward 0.5, 1234 completion tokens/s)."
    assert trainers[0].calls["save_model"] == (("out",), {})


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


@pytest.mark.parametrize(
    ("words", "name"), [([], "CompactProgress"), (["--disable_tqdm"], "LinesOnly")]
)
def test_progress_is_ours(trainers, words, name):
    run(*words)
    assert [type(callback).__name__ for callback in trainers[0].callbacks] == [name]


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
    assert trainers[0].arguments["eval_dataset"][0] == {"prompt": "w5", "answer": 1}


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


# --- for real -------------------------------------------------------------------------------------


def tiny_llama(path) -> str:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "vocab_size": 32, "pad_token_id": 0, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(path)
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(path)
    return str(path)


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
