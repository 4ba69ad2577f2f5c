"""What a run is told: TrainArguments and RLOOConfig, from a recipe and the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import RLOOConfig
from ..names_2024 import RENAMED
from .input import read_command_line, read_yaml
from .options import Option, UsageError
from .recipe_files import FOLDER

REQUIRED = {
    "model_name_or_path": "DIR_OR_HUB_ID",
    "dataset_name": "FILE.jsonl (or DIR, HUB_ID, reasoning_gym:TASK)",
    "reward_funcs": "module:function (or file.py:function, a builtin's name, a reward model)",
}


SAME = (  # written in either way
    ("total_episodes", "max_steps"),
    ("sft_model_path", "model_name_or_path"),
    ("reward_model_path", "reward_funcs"),
)


def _help(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


@dataclass
class TrainArguments:
    """What a run trains on; the names are those of TRL's scripts. How it trains: RLOOConfig."""

    model_name_or_path: str | None = field(
        default=None, metadata=_help("Policy: a directory or a hub id.")
    )
    dataset_name: str | None = field(
        default=None,
        metadata=_help("A .jsonl, .csv, .parquet, directory, hub id, reasoning_gym:TASK."),
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata=_help("module:function, file.py:function, builtin, reward model; several."),
    )
    config: str | None = field(
        default=None, metadata=_help("YAML file of options, or the name of a built-in recipe.")
    )
    variant: str | None = field(
        default=None, metadata=_help("One of the variants that the recipe has; laid over it.")
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata=_help("Tokenizer: a directory or a hub id. Default: the model's.")
    )
    sft_model_path: str | None = field(
        default=None,
        metadata=_help(
            "2024 name of the policy; then model_name_or_path names the tokenizer, as in 2024."
        ),
    )
    reward_model_path: str | None = field(
        default=None, metadata=_help("2024 name of a reward model, the only one of reward_funcs.")
    )
    model_revision: str | None = field(
        default=None, metadata=_help("Branch, tag or commit of a model on the hub.")
    )
    dtype: str | None = field(
        default=None,
        metadata=_help(
            "Type the weights are loaded in. Default: float32.",
            choices=("auto", "bfloat16", "float16", "float32"),
        ),
    )
    attn_implementation: str | None = field(
        default=None,
        metadata=_help("sdpa, flash_attention_2, eager, ... Default: transformers' choice."),
    )
    dataset_subset: str | None = field(
        default=None, metadata=_help("Configuration of the hub dataset dataset_name.")
    )
    dataset_config: dict | str | None = field(
        default=None, metadata=_help("Settings of a reasoning_gym task, as JSON.")
    )
    dataset_size: int = field(
        default=10_000, metadata=_help("Items made for a reasoning_gym task.")
    )
    dataset_map: str | None = field(
        default=None,
        metadata=_help(
            "Function that makes a row with a prompt of each row, or None to leave it out: "
            "module:function, file.py:function, or a name (see recipe_data.py)."
        ),
    )
    dataset_train_split: str = field(default="train", metadata=_help("Split to train on."))
    dataset_test_split: str | None = field(
        default=None,
        metadata=_help("Split to evaluate on. Default: test, if eval_strategy is set."),
    )
    eval_dataset_name: str | None = field(
        default=None, metadata=_help("Where the evaluation split is. Default: in dataset_name.")
    )
    eval_dataset_size: int = field(
        default=200, metadata=_help("Items made to evaluate on a reasoning_gym task.")
    )
    dataset_streaming: bool = field(
        default=False, metadata=_help("Read the dataset while training; needs max_steps.")
    )
    use_peft: bool = field(
        default=False, metadata=_help("Train LoRA adapters, and none of the model's weights.")
    )
    lora_r: int = field(default=16, metadata=_help("Rank of the adapters."))
    lora_alpha: int = field(
        default=32, metadata=_help("The adapters' product is scaled by lora_alpha / lora_r.")
    )
    lora_dropout: float = field(
        default=0.0, metadata=_help("Dropout before the adapters; see disable_dropout.")
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata=_help("Default: every linear layer but the head.")
    )


def gather(argv: Sequence[str], options: Mapping[str, Option]) -> dict[str, Any]:
    """The command line over the recipe it names. Raises UsageError."""
    given = read_command_line(argv, options)
    variant = given.get("variant")
    if given.get("config") is None:
        if variant is not None:
            raise UsageError(f"variant={variant} is of a recipe: name that with --config.")
        return given
    recipe = read_yaml(_recipe_path(given["config"]), options, variant)
    if "config" in recipe:
        raise UsageError(f"{given['config']}: a recipe cannot name another one as config.")
    if "variant" in recipe:
        raise UsageError(f"{given['config']}: a variant is chosen on the command line only.")
    # one thing under two names: the command line wins there too
    for one, other in [*RENAMED.items(), *SAME]:
        for winner, loser in ((one, other), (other, one)):
            if winner in given and loser not in given:
                recipe.pop(loser, None)
    return {**recipe, **given}


def _recipe_path(name: str) -> Path:
    path = Path(name).expanduser()
    if path.exists():
        return path
    if (FOLDER / f"{name}.yaml").is_file():
        return FOLDER / f"{name}.yaml"
    builtin = ", ".join(sorted(recipe.stem for recipe in FOLDER.glob("*.yaml")))
    hint = f" (built-in recipes: {builtin})" if builtin else ""
    raise UsageError(f"there is no file {name}{hint}.")


def build(values: Mapping[str, Any]) -> tuple[TrainArguments, RLOOConfig]:
    """The two dataclasses. Raises UsageError for what is missing, or what RLOOConfig refuses."""
    values = _paths_of_2024(values)
    missing = [f"--{name} {how}" for name, how in REQUIRED.items() if not values.get(name)]
    if missing:
        raise UsageError(f"missing: {', '.join(missing)}. The same names go into a recipe.")
    mine = {f.name for f in dataclasses.fields(TrainArguments)}
    stray = [k for k in values if k.startswith("lora_")]
    if stray and not values.get("use_peft"):
        raise UsageError(f"{stray[0]} is set, but use_peft is not: write --use_peft.")
    if values.get("fsdp") in ("true", "false"):  # the text would be a list of strategies
        values = {**values, "fsdp": values["fsdp"] == "true"}
    script = TrainArguments(**{k: v for k, v in values.items() if k in mine})
    with as_usage_errors(Exception):
        config = RLOOConfig(**{k: v for k, v in values.items() if k not in mine})
    loading = {
        "dtype": script.dtype,
        "attn_implementation": script.attn_implementation,
        "revision": script.model_revision,
    }
    loading = {name: value for name, value in loading.items() if value is not None}
    init_kwargs = config.model_init_kwargs or {}
    assert isinstance(init_kwargs, dict), init_kwargs  # its JSON is read by now
    twice = loading.keys() & init_kwargs.keys()
    if twice:
        raise UsageError(f"{min(twice)} is in model_init_kwargs too: set it in one place.")
    if loading:
        config.model_init_kwargs = {**init_kwargs, **loading}
    return script, config


def _paths_of_2024(values: Mapping[str, Any]) -> dict[str, Any]:
    """With sft_model_path as the policy, model_name_or_path as its tokenizer, reward_model_path as
    the reward: what the scripts of 2024 made of them."""
    values = dict(values)
    if values.get("sft_model_path"):
        tokenizer = values.get("tokenizer_name_or_path") or values.get("model_name_or_path")
        values["tokenizer_name_or_path"] = tokenizer
        values["model_name_or_path"] = values["sft_model_path"]
    if values.get("reward_model_path"):
        if values.get("reward_funcs"):
            raise UsageError("reward_model_path is one of reward_funcs: write all of them there.")
        values["reward_funcs"] = [values["reward_model_path"]]
    return values


@contextmanager
def as_usage_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds become one line for the user; their tracebacks stay attached."""
    try:
        yield
    except kinds as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(text) from error
