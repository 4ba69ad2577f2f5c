"""`rloo-fast train`: everything cheap is checked, then the model is loaded and trained."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from ..checkpoint_files import check_output_dir, checkpoints, find_checkpoint, put_back
from ..config import RLOOConfig, as_dict
from ..data import TASK, has_one_split, load_prompts
from ..models import check_model_path
from ..recipe_data import load_row_function
from ..reports.progress import CompactProgress
from ..rewards import (
    BUILTINS,
    RewardFunc,
    Rewards,
    check_reward_kwargs,
    load_reward_functions,
)
from .arguments import TrainArguments, as_usage_errors, build, gather
from .help import full_help, short_help
from .options import options_of


def main(argv: Sequence[str]) -> int:
    """Run `rloo-fast train` with these arguments. Raises UsageError before anything is trained."""
    options = options_of(TrainArguments, RLOOConfig)
    if {"-h", "--help"} & {*argv}:
        print(full_help(options) if "all" in argv else short_help(options))
        return 0
    script, config = build(gather(argv, options))
    trainer = prepare(script, config)
    trainer.command = shlex.join(["rloo-fast", "train", *argv])
    trainer.dataset_name = script.dataset_name
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    save(trainer, script, config)
    return 0


def prepare(script: TrainArguments, config: RLOOConfig) -> Any:
    """The trainer; what costs little is checked before the model is loaded. Raises UsageError."""
    assert script.model_name_or_path
    assert script.reward_funcs
    _show_log_lines(config)
    with as_usage_errors(ValueError, OSError):
        check_trackers(config.report_to or [])
        check_model_path(script.model_name_or_path)
        check_output_dir(str(config.output_dir))
        config.resume_from_checkpoint = checkpoint_of(config, script.use_peft)
        rewards = check_rewards(script.reward_funcs, config)
        train_set, eval_set = load_datasets(script, config)
        if rewards is not None and train_set.column_names and not config.remove_unused_columns:
            rewards.check_columns(train_set.column_names)
        peft_config = lora_config(script)

    from ..trainer import RLOOTrainer

    # ImportError: flash-attn, bitsandbytes and the like, where they are asked for
    with as_usage_errors(ValueError, ImportError):
        try:
            trainer = RLOOTrainer(
                model=script.model_name_or_path,
                reward_funcs=list(script.reward_funcs),
                args=config,
                train_dataset=train_set,
                eval_dataset=eval_set,
                processing_class=load_named_tokenizer(script, config),
                peft_config=peft_config,
            )
        except OSError as error:  # from_pretrained's, which may not say what it was loading
            raise ValueError(f"model {script.model_name_or_path!r}: {error}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LinesOnly() if config.disable_tqdm else CompactProgress())
    return trainer


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


def check_rewards(names: Sequence[str], config: RLOOConfig) -> Rewards | None:
    """The functions among the rewards, imported; None if all are models. Raises ValueError."""
    weights, arguments = config.reward_weights, as_dict(config.reward_kwargs)
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"reward_weights: {len(weights)} numbers for {len(names)} reward_funcs, give one each."
        )
    functions: list[RewardFunc] = []
    for name in names:
        if Path(name).is_dir():
            check_model_path(name)
        elif name in BUILTINS or ":" in name or "/" not in name or name.endswith(".py"):
            functions.append(name)
    check_reward_kwargs(arguments, names)
    if not functions:
        return None
    return load_reward_functions(
        functions,
        reward_kwargs={name: a for name, a in arguments.items() if name in functions},
        execute_model_code=config.execute_model_code,
    )


def load_datasets(script: TrainArguments, config: RLOOConfig) -> tuple[Any, Any]:
    """The rows to train on, and those to evaluate on or None. Raises ValueError."""
    name = script.dataset_name
    assert name is not None
    eval_name = script.eval_dataset_name or name
    task_config, make_row = script.dataset_config, None
    if script.dataset_map is not None:
        make_row = load_row_function(script.dataset_map)
    assert not isinstance(task_config, str), task_config  # its JSON is read by now
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
    )
    return train_set, eval_set


def load_named_tokenizer(script: TrainArguments, config: RLOOConfig) -> Any:
    """The tokenizer that is not the model's own, None where it is. Raises ValueError."""
    name = script.tokenizer_name_or_path
    if name is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {name!r}: {error}") from error


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


def save(trainer: Any, script: TrainArguments, config: RLOOConfig) -> None:
    """Model, tokenizer and model card in output_dir, and a last line that says how it went."""
    trainer.save_model(config.output_dir)
    trainer.create_model_card()
    if config.push_to_hub:
        trainer.push_to_hub()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    parts = [f"{trainer.state.global_step} steps"]
    if logs:
        parts.append(f"reward {logs[-1]['reward']:.3g}")
        rate = logs[-1].get("throughput/completion_tokens_per_s")
        parts += [f"{rate:.0f} completion tokens/s"] if rate is not None else []
    _say(config, f"The model is in {config.output_dir} ({', '.join(parts)}).")
    trainer.end()


class LinesOnly(CompactProgress):
    """The lines of CompactProgress without its bar."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, disable=True)
        self.current_step = state.global_step


class _ToStderr(logging.Handler):
    """Looks sys.stderr up at each line, so that whoever redirects it is obeyed."""

    def emit(self, record: logging.LogRecord) -> None:
        # tqdm's: a line does not tear the progress bar
        tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


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
