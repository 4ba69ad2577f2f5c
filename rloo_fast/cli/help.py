"""`rloo-fast train --help`: the options most runs need, a line each, or all of them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from ..objective.losses import ADVANTAGES, LOSSES
from .options import Option

WIDTH = 100
HEADINGS = {"RLOOFields": "RLOOConfig"}  # the class that users know, for the one that declares
USAGE = """\
usage: rloo-fast train --model_name_or_path M --dataset_name D --reward_funcs R [--option value ...]
       rloo-fast train --config recipe.yaml [--option value ...]

Train a causal language model with RLOO. Recipes have the same names; the command line wins.
"""
# Section -> fields; a text in place of None where the field's own is too long for a line
SECTIONS: dict[str, dict[str, str | None]] = {
    "Data and model": {
        "model_name_or_path": None,
        "dataset_name": None,
        "reward_funcs": None,
        "reward_weights": None,
        "config": None,
        "variant": None,
        "dataset_map": "Function that makes a row with a prompt of each row; or a name.",
        "dataset_config": None,
        "dataset_size": None,
        "eval_dataset_name": None,
        "dtype": None,
        "use_peft": None,
        "lora_r": None,
    },
    "Algorithm": {
        "num_generations": None,
        "beta": None,
        "advantage": f"Compared with others of a prompt as {', '.join(ADVANTAGES)}.",
        "loss": f"{', '.join(LOSSES)}.",
        "epsilon": "Clip of the ratio to 1 -+ epsilon (or + epsilon_high).",
        "num_iterations": None,
        "steps_per_generation": "Forwards per generation batch. Default: until the next update.",
        "normalize_advantages": "Advantages to mean 0, std 1 over the generation batch.",
        "reward_clip_range": "Clip the weighted reward to MIN MAX, or to (-C, C).",
        "missing_eos_penalty": "Subtracted from the reward of a completion that was cut.",
    },
    "Sampling": {
        "max_completion_length": None,
        "temperature": None,
        "top_p": None,
        "generation_kwargs": "JSON of more GenerationConfig arguments; they win.",
    },
    "Optimisation": {
        "learning_rate": None,
        "lr_scheduler_type": "Schedule: linear, cosine, constant, ...",
        "warmup_steps": "Steps of linear warmup; below 1: share of the run.",
        "max_grad_norm": "Largest gradient norm; 0: no clipping.",
        "per_device_train_batch_size": "Completions per forward and process.",
        "gradient_accumulation_steps": "Forwards per optimizer step.",
        "num_train_epochs": "Passes over the prompts.",
        "max_steps": "Optimizer steps; -1: from num_train_epochs.",
        "bf16": "bfloat16 autocast. Default: where a GPU supports it.",
        "gradient_checkpointing": "Recompute activations: less memory, one more forward.",
        "seed": "Seed of prompts' order, sampling and adapters.",
    },
    "Logging and saving": {
        "output_dir": "For checkpoints, metrics, the model. Default: trainer_output.",
        "logging_steps": None,
        "log_completions": "Print samples with their rewards at every log.",
        "view_mib": "MiB of completions kept for `rloo-fast view`; 0: none. Default: 256.",
        "report_to": "Trackers: wandb, tensorboard, trackio, ..., none.",
        "eval_strategy": "When to evaluate: no, steps, epoch.",
        "eval_steps": "Steps between evaluations. Default: logging_steps.",
        "save_steps": "Steps between checkpoints.",
        "save_total_limit": "Checkpoints kept. Default: all.",
        "resume_from_checkpoint": "true: the last checkpoint in output_dir; or a path.",
        "disable_tqdm": "No progress bar.",
    },
}
FOOTER = """
Every other field of RLOOConfig and of transformers' TrainingArguments is an option too:
`rloo-fast train --help all` lists them. RLOO_FAST_DEBUG=1 shows tracebacks of errors."""


def short_help(options: Mapping[str, Option]) -> str:
    """The options of SECTIONS, one line each."""
    lines = [USAGE]
    for section, names in SECTIONS.items():
        lines.append(f"{section}:")
        lines += [option_line(options[name], text) for name, text in names.items()]
    return "\n".join(lines) + "\n" + FOOTER


def full_help(options: Mapping[str, Option]) -> str:
    """Every option, with the class that declares it."""
    lines = [USAGE]
    for owner in dict.fromkeys(option.owner for option in options.values()):
        lines.append(f"{HEADINGS.get(owner, owner)}:")
        for option in sorted(options.values(), key=lambda option: option.name):
            if option.owner != owner or option.help == "Not offered yet.":
                continue
            line = f"--{option.name}: {option.expected}{_default(option)}"
            lines += textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent=" " * 6)
            lines += textwrap.wrap(
                option.help, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def option_line(option: Option, text: str | None) -> str:
    text = text or option.help
    line = f"  --{option.name:<28}{text}"
    return line + (_default(option) if "default" not in text.lower() else "")


def _default(option: Option) -> str:
    default = getattr(option.default, "value", option.default)  # a member of an Enum
    if default is None or default == "":
        return ""
    if isinstance(default, bool):
        default = str(default).lower()
    return f" [{default:g}]" if isinstance(default, float) else f" [{default}]"
