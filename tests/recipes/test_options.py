"""The recipes of runs: what their options and variants come to, beside the commands of 2024."""

from __future__ import annotations

import shlex

import pytest
from transformers import TrainingArguments

from rloo_fast import RLOOConfig, cli
from rloo_fast.cli.arguments import TrainArguments, build, gather
from rloo_fast.cli.input import ELSEWHERE
from rloo_fast.cli.options import UsageError, options_of

OPTIONS = options_of(TrainArguments, RLOOConfig)


def run_of(*words: str) -> tuple[TrainArguments, RLOOConfig]:
    return build(gather([*words, "--use_cpu", "--report_to", "none"], OPTIONS))


@pytest.fixture
def eight_processes(monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 8))


# the command of TRL's 2024 documentation for its summaries; its launcher's options left out
COMMAND_2024 = shlex.split("""
--output_dir models/minimal/rloo_tldr
--dataset_name trl-internal-testing/tldr-preference-sft-trl-style
--dataset_test_split validation --num_ppo_epochs 2 --num_mini_batches 2 --learning_rate 3e-6
--per_device_train_batch_size 16 --gradient_accumulation_steps 16 --total_episodes 1000000
--model_name_or_path EleutherAI/pythia-1b-deduped
--sft_model_path cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr
--reward_model_path cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr
--local_rollout_forward_batch_size 16 --missing_eos_penalty 1.0 --stop_token eos --kl_coef 0.03
""")


@pytest.mark.parametrize("recipe", [[], ["--config", "recipe:tldr"]], ids=["alone", "on recipe"])
def test_the_command_of_2024_means_what_it_meant(recipe, eight_processes):
    script, args = run_of(*recipe, *COMMAND_2024)
    assert script.model_name_or_path == "cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr"
    assert script.tokenizer_name_or_path == "EleutherAI/pythia-1b-deduped"
    assert script.reward_funcs == ["cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr"]
    assert (args.generation_batch_size, args.prompts_per_generation) == (4096, 2048)
    assert (args.num_iterations, args.steps_per_generation) == (2, 32)
    assert args.max_steps == 245 * 2 * 2
    assert (args.beta, args.missing_eos_penalty, args.rollout_forward_batch_size) == (0.03, 1.0, 16)


def test_recipe_tldr_is_that_command_with_the_defaults_of_2024(eight_processes):
    command, recipe = run_of(*COMMAND_2024)[1], run_of("--config", "recipe:tldr")[1]
    different = {
        name
        for name, value in vars(recipe).items()
        if value != vars(command)[name] and name in RLOOConfig.__dataclass_fields__
    }
    # transformers >= 5.20 has the same field under a second name
    assert different - {"activation_checkpointing"} == {
        "max_completion_length", "temperature", "max_grad_norm", "max_prompt_length", "kl_coef",
        "num_ppo_epochs", "gradient_checkpointing", "reward_model_position", "save_total_limit",
        "rollout_forward_batch_size", "local_rollout_forward_batch_size", "output_dir",
    }  # fmt: skip
    assert (recipe.max_completion_length, recipe.temperature) == (53, 0.7)
    assert (recipe.max_grad_norm, recipe.max_prompt_length) == (0, 512)


def test_four_summaries_per_post_are_of_half_as_many_posts(eight_processes):
    args = run_of("--config", "recipe:tldr", "--variant", "k4")[1]
    assert (args.generation_batch_size, args.num_generations) == (4096, 4)
    assert args.prompts_per_generation == 1024


def test_both_sentiment_cards_come_from_one_recipe():
    (script, rloo), (same, grpo) = (
        run_of("--config", "recipe:sentiment", *more) for more in ([], ["--variant", "grpo"])
    )
    assert vars(same) == {**vars(script), "variant": "grpo"}
    assert (rloo.advantage, rloo.loss, rloo.reward_model_output) == ("rloo", "rloo", "logit")
    assert (grpo.advantage, grpo.loss, grpo.reward_model_output) == ("grpo", "dapo", "probability")
    for args in (rloo, grpo):
        assert (args.generation_batch_size, args.prompts_per_generation) == (32, 8)
        assert (args.num_generations, args.per_device_train_batch_size) == (4, 2)
        assert (args.beta, args.learning_rate, args.max_completion_length) == (0.02, 3e-5, 32)
    assert (rloo.bf16, grpo.bf16) == (False, True)
    assert (script.lora_dropout, rloo.disable_dropout) == (0.05, False)


@pytest.mark.parametrize("name", ["tldr", "sentiment", "mbpp", "vision", "smoke_2024"])
def test_paths_can_be_replaced(name):
    three = ["--model_name_or_path", "m", "--reward_funcs", "r", "--dataset_name", "d.jsonl"]
    script, _ = run_of("--config", f"recipe:{name}", *three)
    assert (script.model_name_or_path, script.reward_funcs, script.dataset_name) == (
        "m", ["r"], "d.jsonl",
    )  # fmt: skip
    assert script.dataset_subset is None  # which a file does not have


def test_the_old_names_of_paths_replace_a_recipe_s():
    script, _ = run_of(
        "--config", "recipe:tldr", "--sft_model_path", "p", "--reward_model_path", "r"
    )
    assert (script.model_name_or_path, script.tokenizer_name_or_path) == ("p", None)
    assert script.reward_funcs == ["r"]


def test_code_is_run_only_where_the_user_says_so(tmp_path, capsys):
    words = ["--config", "recipe:mbpp", "--output_dir", str(tmp_path), "--report_to", "none"]
    assert cli.main(["train", *words, "--use_cpu"]) == 2
    assert "--execute_model_code" in capsys.readouterr().err


# --- options of the 2024 scripts that are written differently, and variants that are wrong

FIELDS_2024 = shlex.split("""
dataset_name dataset_config dataset_train_split dataset_test_split ignore_bias_buffers
gradient_checkpointing_use_reentrant model_name_or_path model_revision torch_dtype
trust_remote_code attn_implementation use_peft lora_r lora_alpha lora_dropout lora_target_modules
lora_modules_to_save lora_task_type use_rslora load_in_8bit load_in_4bit bnb_4bit_quant_type
use_bnb_nested_quant run_name dataset_num_proc num_mini_batches total_episodes
local_rollout_forward_batch_size num_sample_generations response_length stop_token stop_token_id
temperature missing_eos_penalty sft_model_path world_size num_total_batches micro_batch_size
local_batch_size batch_size local_mini_batch_size mini_batch_size push_to_hub exp_name
reward_model_path num_ppo_epochs whiten_rewards kl_coef cliprange rloo_k normalize_reward
reward_clip_range normalize_advantage token_level_kl ds3_gather_for_generation non_eos_penalty
penalty_reward_value truncate_token truncate_token_id sanity_check dataset_text_field max_length
""")


def test_every_option_of_the_2024_scripts_is_taken_or_answered():
    assert [name for name in FIELDS_2024 if name not in OPTIONS and name not in ELSEWHERE] == []
    assert [name for name in ELSEWHERE if name in OPTIONS] == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--exp_name x", "unknown option --exp_name: write run_name."),
        ("--batch_size 8", "--batch_size: it is computed from the batch sizes of a device"),
        ("--warmup_ratio 0.1", "write warmup_steps, which below 1 is a share of the run"),
        ("--config recipe:tldr --variant k8", "has no variant 'k8': it has k4."),
        ("--config recipe:mbpp --variant k8", "has no variant 'k8': it has none."),
        ("--variant k4", "variant=k4 is of a recipe: name that with --config."),
        ("--config recipe:tldr --reward_model_path a --reward_funcs b", "one of reward_funcs"),
    ],
)
def test_what_does_not_go_is_answered(words, sentence, capsys):
    assert cli.main(["train", *words.split(), "--use_cpu"]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_line_wins_over_a_variant(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("beta: 0.1\nvariants:\n  low: {beta: 0.2, seed: 3}\n  none:\n    seed: 4\n")
    low = gather(["--config", str(file), "--variant", "low", "--seed", "9"], OPTIONS)
    assert (low["beta"], low["seed"]) == (0.2, 9)
    assert gather(["--config", str(file)], OPTIONS) == {"beta": 0.1, "config": str(file)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("beta: 1\nvariants:\n  a:\n    bta: 2\n", "unknown key 'bta' in .*, line 4"),
        ("variants:\n  a: {seed: x}\n", "line 2: seed: expected an integer"),
        ("variants: [a]\n", "variants must be a mapping of names to mappings of options"),
        ("variants:\n  a: 3\n", "variants must be a mapping of names to mappings of options"),
        ("variant: a\n", "a variant is chosen on the command line only"),
    ],
)
def test_a_wrong_variant_is_told_with_its_line(text, sentence, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        gather(["--config", str(tmp_path / "run.yaml")], OPTIONS)
