"""What a run is told: TrainArguments and RLOOConfig, from a recipe and the command line."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.names_2024 import RENAMED
from ..config.paths import user_path
from ..data.row_functions import ROW_FUNCTIONS
from .input import read_command_line, read_yaml
from .options import Option, UsageError, options_named, options_of
from .recipe_files import FOLDER

if TYPE_CHECKING:
    from ..config.rloo_config import RLOOConfig

CONFIG = "rloo_fast.config.rloo_config:RLOOConfig"

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

# transformers and peft take ~/model for a name of the hub
MODELS = ("model_name_or_path", "tokenizer_name_or_path", "merge_adapter")
NUMBERS = {  # field of TrainArguments: its range
    "dataset_size": (1, 2**31),
    "eval_dataset_size": (1, 2**31),
    "lora_r": (1, 2**16),
    "lora_alpha": (1, 2**31),
    "lora_dropout": (0, 1),
}

VIEW_MIB = 256  # unless view_mib says otherwise


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
    tools: list[str] | None = field(
        default=None,
        metadata=_help(
            "Functions that the policy may call: calculator, python, module:function, "
            "file.py:function; several."
        ),
    )
    environment_factory: str | None = field(
        default=None,
        metadata=_help(
            "Class of environments, or a dict of them by the rows' column environment: "
            "module:name, file.py:name."
        ),
    )
    rollout_func: str | None = field(
        default=None,
        metadata=_help("Function that makes the completions: module:function, file.py:function."),
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
            f"module:function, file.py:function, or one of {', '.join(ROW_FUNCTIONS)}."
        ),
    )
    dataset_types: dict | str | None = field(
        default=None,
        metadata=_help(
            "Types of columns of .csv, .tsv, .json and .jsonl files, as JSON: "
            '{"answer": "float"}; int | float | bool | json | str. Default: values as written, '
            "every cell of a CSV file text."
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
    model_card_prompt: str | None = field(
        default=None,
        metadata=_help(
            "Prompt of the model card's quick start. Default: one of the training prompts where "
            "anybody may see them (reasoning_gym:TASK, an open dataset of the hub without "
            "dataset_map), else a general one."
        ),
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
    load_in_4bit: bool = field(
        default=False,
        metadata=_help("Hold the model's weights in 4 bits (bitsandbytes); with use_peft."),
    )
    load_in_8bit: bool = field(
        default=False,
        metadata=_help("Hold the model's weights in 8 bits (bitsandbytes); with use_peft."),
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata=_help("The 4 bits are those of this type.", choices=("nf4", "fp4"))
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata=_help("Quantise the scales of the 4 bits, too.")
    )


def train_options() -> dict[str, Option]:
    """What `train` and `eval reward` can be told, by name; without torch."""
    return {**options_of(TrainArguments), **options_named(CONFIG)}


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
    path = user_path(name)
    if path.exists():
        return path
    if (FOLDER / f"{name}.yaml").is_file():
        return FOLDER / f"{name}.yaml"
    builtin = ", ".join(sorted(recipe.stem for recipe in FOLDER.glob("*.yaml")))
    hint = f" (built-in recipes: {builtin})" if builtin else ""
    raise UsageError(f"there is no file {name}{hint}.")


def build(values: Mapping[str, Any]) -> tuple[TrainArguments, RLOOConfig]:
    """The two dataclasses. Raises UsageError for what is missing, or what RLOOConfig refuses."""
    values = check_given(values)
    homes = {name: os.path.expanduser(values[name]) for name in MODELS if values.get(name)}
    values = {**values, **homes}
    mine = {f.name for f in dataclasses.fields(TrainArguments)}
    if values.get("fsdp") in ("true", "false"):  # the text would be a list of strategies
        values = {**values, "fsdp": values["fsdp"] == "true"}
    script = TrainArguments(**{k: v for k, v in values.items() if k in mine})

    from ..config.rloo_config import RLOOConfig  # with torch

    modules_here()
    with as_usage_errors(Exception):
        given = {k: v for k, v in values.items() if k not in mine}
        config = RLOOConfig(**{"log_format": "line", "view_mib": VIEW_MIB, **given})
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


def modules_here() -> None:
    """Let `--reward_funcs my_rewards:score` be a module in the working directory.

    Last in the path of modules: a yaml.py there is not the package of that name.
    """
    with suppress(FileNotFoundError):  # the directory was removed
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())


def check_given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values under the names of today. Raises UsageError for what is missing, and for options
    of adapters without them: all that can be said without torch."""
    values = _paths_of_2024(values)
    needed = {**REQUIRED}
    if values.get("environment_factory"):
        del needed["reward_funcs"]  # an environment may have a reward of its own
    missing = [f"--{name} {how}" for name, how in needed.items() if not values.get(name)]
    if missing:
        raise UsageError(f"missing: {', '.join(missing)}. The same names go into a recipe.")
    stray = [k for k in values if k.startswith("lora_")]
    if stray and not values.get("use_peft"):
        raise UsageError(f"{stray[0]} is set, but use_peft is not: write --use_peft.")
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if values.get(name)]
    if len(bits) == 2:
        raise UsageError("load_in_4bit and load_in_8bit are both set: write one of them.")
    if bits and not values.get("use_peft"):
        raise UsageError(
            f"{bits[0]}: quantised weights are not trained themselves: add --use_peft."
        )
    for name, (low, high) in NUMBERS.items():
        if name in values and not low <= values[name] <= high:
            raise UsageError(f"{name} must be from {low} to {high}, got {values[name]}.")
    return values


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
