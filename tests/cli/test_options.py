"""Values of options: how they are read from a command line and from a recipe."""

from __future__ import annotations

import pytest

from rloo_fast.cli.arguments import gather
from rloo_fast.cli.options import convert
from tests.support.commands import OPTIONS, THREE, parsed, recipe


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
