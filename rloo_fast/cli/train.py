"""`rloo-fast train`: everything cheap is checked, then the model is loaded and trained."""

from __future__ import annotations

import logging
import math
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.utils.logging import disable_progress_bar

from ..checkpoint.files import checkpoints, find_checkpoint, put_back
from ..config.code_files import load_module
from ..config.paths import user_path
from ..config.rloo_config import RLOOConfig
from ..data.row_functions import load_row_function
from ..data.sources import TASK, has_one_split, load_prompts
from ..masking import masked, masked_argv
from ..models.pretrained import damage
from ..reports.example_prompt import public_prompt
from ..rewards import RewardSources
from .arguments import TrainArguments, as_usage_errors, build


def run(argv: Sequence[str], values: Mapping[str, Any]) -> int:
    """Train with these values, which `argv` was read to; 1 if no completion had a reward.

    Raises UsageError before anything is trained.
    """
    script, config = build(values)
    trainer = prepare(script, config)
    trainer.command = shlex.join(["rloo-fast", "train", *masked_argv(argv)])
    trainer.dataset_name = script.dataset_name
    if config.process_index == 0:
        trainer.card.example_prompt = example_prompt(script, trainer.train_dataset)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    save(trainer, script, config)
    saved = trainer.checkpoints.failed_step is None  # what was said of it is above
    return 0 if had_rewards(trainer, config) and saved else 1


def prepare(script: TrainArguments, config: RLOOConfig) -> Any:
    """The trainer, with its model loaded. Raises UsageError.

    Checked here is what the trainer is not given (trackers, checkpoint, dataset names); paths,
    rewards, prompts and adapters are the trainer's to check, before it loads a model.
    """
    assert script.model_name_or_path
    _show_log_lines(config)
    with as_usage_errors(ValueError, OSError):
        check_trackers(config.report_to or [])
        config.resume_from_checkpoint = checkpoint_of(config, script.use_peft)
        rewards = RewardSources.from_config(
            [*(script.reward_funcs or ())],
            None,
            config,
            may_be_none=script.environment_factory is not None,
        )
        environments = named(script.environment_factory, "environment_factory")
        rollout_func = named(script.rollout_func, "rollout_func")
        train_set, eval_set = load_datasets(script, config)
        peft_config = lora_config(script)
        quantization = quantization_config(script, config)

    from ..trainer import RLOOTrainer

    # ImportError: flash-attn, bitsandbytes and the like, where they are asked for
    with as_usage_errors(ValueError, ImportError):
        try:
            trainer = RLOOTrainer(
                model=script.model_name_or_path,
                reward_funcs=rewards,
                args=config,
                train_dataset=train_set,
                eval_dataset=eval_set,
                processing_class=load_named_tokenizer(script, config),
                peft_config=peft_config,
                quantization_config=quantization,
                tools=script.tools,
                rollout_func=rollout_func,
                environment_factory=environments,
            )
        except OSError as error:  # from_pretrained's, which may not say what it was loading
            raise ValueError(f"model {script.model_name_or_path!r}: {error}") from error
    return trainer


def named(text: str | None, option: str) -> Any:
    """What module:name or file.py:name stands for, None without. Raises ValueError."""
    if text is None:
        return None
    where, colon, name = text.rpartition(":")
    if not colon:
        raise ValueError(f"{option} must be module:name or file.py:name, got {text!r}.")
    module = load_module(where, f"{option}={text!r}")
    if not hasattr(module, name):
        raise ValueError(f"{option}={text!r}: {where} has no {name!r}.")
    return getattr(module, name)


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a name in report_to that transformers cannot report to here."""
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in (*installed, "flyte"):
            raise ValueError(
                f"report_to={name!r} is not installed here (installed: "
                f"{', '.join(installed) or 'none'}): pip install {name}, or write none."
            )


def checkpoint_of(config: RLOOConfig, use_peft: bool) -> str | None:
    """What resume_from_checkpoint stands for; `true` and `last` may find none, which is said.

    Raises ValueError for a directory that is no complete checkpoint, or one without adapters.
    """
    wanted = config.resume_from_checkpoint
    if wanted is None or wanted.lower() in ("false", "no", "none"):
        return None
    newest = wanted.lower() in ("true", "last", "yes")
    run_dir = Path(str(config.output_dir))
    if newest:
        put_back(run_dir)
        if not checkpoints(run_dir):
            _say(config, f"No checkpoint in {run_dir} yet: starting from the beginning.")
            return None
    found = find_checkpoint(True if newest else wanted, str(run_dir))
    if use_peft and found and not (Path(found) / "adapter_config.json").is_file():
        raise ValueError(
            f"{found} was saved without adapters: leave out use_peft, or resume_from_checkpoint."
        )
    _say(config, f"Resuming from {found}.")
    return found


def load_datasets(script: TrainArguments, config: RLOOConfig) -> tuple[Any, Any]:
    """The rows to train on, and those to evaluate on or None. Raises ValueError."""
    name = script.dataset_name
    assert name is not None
    eval_name = script.eval_dataset_name or name
    task_config, make_row = script.dataset_config, None
    if script.dataset_map is not None:
        make_row = load_row_function(script.dataset_map)
    types = script.dataset_types or {}
    # their JSON is read by now
    assert not isinstance(task_config, str), task_config
    assert not isinstance(types, str), types
    with_task = [n for n in (name, eval_name) if n.startswith(TASK)] or [name]
    train_set = load_prompts(
        name,
        split=script.dataset_train_split,
        subset=script.dataset_subset,
        size=script.dataset_size,
        seed=config.seed,
        task_config=task_config if name in with_task else None,
        streaming=script.dataset_streaming,
        row_function=make_row,
        types=types,
        bad_rows=config.skip_unusable_rows,
    )
    if config.eval_strategy == "no" and not config.eval_on_start:
        if script.eval_dataset_name:
            raise ValueError(
                "an evaluation set is named, but eval_strategy is 'no': add --eval_strategy steps."
            )
        if script.dataset_test_split:  # the 2024 scripts took it as well, and did not read it
            _say(config, "dataset_test_split is not used: eval_strategy is 'no'.")
        return train_set, None
    alone = script.eval_dataset_name is not None and has_one_split(eval_name)
    eval_set = load_prompts(
        eval_name,
        split=script.dataset_test_split or ("train" if alone else "test"),
        subset=script.dataset_subset if eval_name == name else None,
        size=script.eval_dataset_size,
        seed=config.seed + script.dataset_size,  # a task's item i is made from seed + i
        task_config=task_config if eval_name in with_task else None,
        exclude_prompts={*train_set["prompt"]} if len(with_task) == 2 else (),
        row_function=make_row,
        types={} if eval_name.startswith(TASK) else types,
        bad_rows=config.skip_unusable_rows,
    )
    return train_set, eval_set


def example_prompt(script: TrainArguments, rows: Any) -> Any:
    """The model card's, None where the rows may be private: a file's, or what code of the user's
    made of others."""
    if script.model_card_prompt is not None or script.dataset_map is not None:
        return script.model_card_prompt
    return public_prompt(script.dataset_name, rows)


def load_named_tokenizer(script: TrainArguments, config: RLOOConfig) -> Any:
    """The tokenizer that is not the model's own, None where it is. Raises ValueError."""
    name = script.tokenizer_name_or_path
    if name is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # of a damaged file, tokenizers raises no narrower one
        why = damage(user_path(name)) or error
        raise ValueError(f"tokenizer {name!r}: {why}") from error


def lora_config(script: TrainArguments) -> Any:
    """peft's LoraConfig, or None without use_peft."""
    if not script.use_peft:
        return None
    from peft import LoraConfig

    targets = script.lora_target_modules or ["all-linear"]
    return LoraConfig(
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )


def quantization_config(script: TrainArguments, config: RLOOConfig) -> Any:
    """bitsandbytes' settings for the model's weights, or None. Raises ValueError without it."""
    if not (script.load_in_4bit or script.load_in_8bit):
        return None
    bits = "load_in_4bit" if script.load_in_4bit else "load_in_8bit"
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{bits} needs bitsandbytes, which is not installed: pip install it.")
    from transformers import BitsAndBytesConfig

    if script.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    named = script.dtype if script.dtype != "auto" else None
    half = "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=script.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=script.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=named or half,
    )


def save(trainer: Any, script: TrainArguments, config: RLOOConfig) -> None:
    """Model, tokenizer and model card in output_dir, and a last line that says how it went."""
    trainer.save_model(config.output_dir, _internal_call=True)  # pushed below
    trainer.create_model_card()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    parts = [f"{trainer.state.global_step} steps"]
    if logs:
        parts.append(f"reward {logs[-1]['reward']:.3g}")
        rate = logs[-1].get("throughput/completion_tokens_per_s")
        parts += [f"{rate:.0f} completion tokens/s"] if rate is not None else []
    _say(config, f"The model is in {config.output_dir} ({', '.join(parts)}).")
    if config.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


def had_rewards(trainer: Any, config: RLOOConfig) -> bool:
    """False, and said, where every reward of the run was None: nothing was learned from any."""
    steps = [row for row in trainer.state.log_history if "loss" in row]
    rewards = [row.get("reward", math.nan) for row in steps]  # None is not logged
    if not steps or not all(map(math.isnan, rewards)):
        return True
    if config.process_index == 0:
        print(
            "rloo-fast: error: every reward function returned None for every completion, so that "
            f"the model in {config.output_dir} has learned nothing from them: check that the "
            "dataset has the columns that the functions read, and answers that they can read.",
            file=sys.stderr,
        )
    return False


class _ToStderr(logging.Handler):
    """Looks sys.stderr up at each line, so that whoever redirects it is obeyed."""

    def emit(self, record: logging.LogRecord) -> None:
        # tqdm's: a line does not tear the progress bar
        line = masked(f"{record.levelname.lower()}: {record.getMessage()}")
        tqdm.write(line, file=sys.stderr)


def _show_log_lines(config: RLOOConfig) -> None:
    """rloo_fast's notes (which path was taken and why) on stderr, of the main process only."""
    # what will change in transformers 6 is for us to see, not for whoever runs a command
    for module in ("transformers", "torch", "deepspeed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers' own, of reading and writing weights
    logger = logging.getLogger("rloo_fast")
    logger.setLevel(logging.INFO if config.process_index == 0 else logging.ERROR)
    if not any(isinstance(handler, _ToStderr) for handler in logger.handlers):
        logger.addHandler(_ToStderr())


def _say(config: RLOOConfig, line: str) -> None:
    if config.process_index == 0:
        print(line, flush=True)
