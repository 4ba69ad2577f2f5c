"""`rloo-fast quickstart`: a whole RLOO run on real problems, on a CPU, without downloads.

A one-million-parameter Qwen2 learns to spell five-letter words backward (reasoning-gym's
`spell_backward`, scored by the library's verifier). Its warm start shows it each word spelled
backward and, as often, just copied (`warm_start.py`); `rloo-fast train` then has to find out from
the reward alone which of the two is asked for. Accuracy is measured on held-out words before and
after, sampled at the training temperature and greedily. The variant `tools` has another task, see
`quickstart_tools.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..reports.machine import cpu_cores, cpu_model, load_average
from .parser import Parser

if TYPE_CHECKING:
    from datasets import Dataset

TASK = "spell_backward"
TASK_CONFIG: dict[str, Any] = {"min_word_len": 5, "max_word_len": 5}
NUM_HELDOUT, NUM_RLOO, NUM_DEMONSTRATED = 300, 1300, 6500  # words, no word in two of them
WARM_START_STEPS = 600
MAX_NEW_TOKENS = 6  # five letters and EOS
TEMPERATURE = 1.0  # this and the line above as in recipes/quickstart.yaml


def main(argv: list[str] | None = None) -> int:
    """Run it all; 0 if it went through. Writes into --output_dir, see `result.json` there."""
    options = _options(argv)
    # Before torch is loaded: its threads sleep while they wait for one another. By default they
    # spin, which costs 4x the time on cores that other programs use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    out = options.output_dir
    out.mkdir(parents=True, exist_ok=True)
    start, load_before = time.perf_counter(), load_average()
    if not sys.stderr.isatty():
        _no_progress_bars()

    from ..reports.metrics_file import read_metrics
    from .warm_start import WRONG_SHARE

    task = _tools_task(options) if options.variant == "tools" else _words_task(options)
    train_s = _train(out, options, task.card_prompt)
    accuracies = task.finish()
    result = {
        "task": task.name,
        "engine": options.engine,
        "method": options.variant or "rloo",
        "seed": options.seed,
        **accuracies,
        "num_heldout": task.num_heldout,
        "temperature": TEMPERATURE,
        "wrong_demonstrations": WRONG_SHARE,
        "num_parameters": task.num_parameters,
        "steps": read_metrics(out / "rloo")[-1]["step"],
        "train_s": round(train_s, 1),
        "total_s": round(time.perf_counter() - start, 1),
        "completion_tokens_per_s": _tokens_per_s(out / "rloo"),
        "machine": {
            "cpu": cpu_model(),
            "cpu_cores": cpu_cores(),
            "load_average_before": load_before,
            "load_average_after": load_average(),
        },
        "versions": _versions(),
    }
    _say_result(out, result)
    return 0


class Task(NamedTuple):
    """What is learned, with its data and its warm start in place.

    `finish()`: after training, shows what has become of it, and returns the accuracies.
    """

    name: str
    num_heldout: int
    num_parameters: int
    card_prompt: str | None  # of the model card; None: a general one
    finish: Callable[[], dict[str, float]]


def _words_task(options: argparse.Namespace) -> Task:
    from .warm_start import (
        WRONG_SHARE,
        build_model,
        build_tokenizer,
        make_demonstrations,
        warm_start,
    )

    out, seed = options.output_dir, options.seed
    heldout, train, demonstrated = make_problems(seed)
    for name, problems in (("heldout", heldout), ("train", train)):
        problems.to_json(out / f"{name}.jsonl")
    tokenizer = build_tokenizer(demonstrated)
    model = build_model(tokenizer, seed)
    _say(
        f"Warm start: {model.num_parameters() / 1e6:.2f}M parameters, {2 * len(demonstrated)} "
        f"demonstrations, of which {WRONG_SHARE:.0%} are wrong (the word copied, not reversed)"
    )
    demonstrations = make_demonstrations(demonstrated, seed)
    warm_start(
        model, tokenizer, demonstrations, out / "warm_start", max_steps=WARM_START_STEPS, seed=seed
    )
    before = measure(out / "warm_start", heldout, seed)
    _say(f"Before RLOO: {before['sampled']:.3f} sampled, {before['greedy']:.3f} greedy")

    def finish() -> dict[str, float]:
        after = measure(out / "rloo", heldout, seed)
        _show(heldout, before, after)
        return _accuracies(before, after)

    name = f"reasoning_gym:{TASK}"
    return Task(name, len(heldout), model.num_parameters(), heldout["prompt"][0], finish)


def _tools_task(options: argparse.Namespace) -> Task:
    from . import quickstart_tools as products
    from .warm_start import WRONG_SHARE, build_model, teach

    out, seed = options.output_dir, options.seed
    heldout, train, demonstrated = products.make_problems(seed)
    for name, problems in (("heldout", heldout), ("train", train)):
        problems.to_json(out / f"{name}.jsonl")
    tokenizer = products.build_tokenizer()
    model = build_model(tokenizer, seed)
    _say(
        f"Warm start: {model.num_parameters() / 1e6:.2f}M parameters, {2 * len(demonstrated)} "
        f"demonstrations, of which {WRONG_SHARE:.0%} are wrong (a number made up, no call)"
    )
    rows = products.make_demonstrations(demonstrated, tokenizer, seed)
    teach(
        model,
        tokenizer,
        rows,
        out / "warm_start",
        max_steps=products.WARM_START_STEPS,
        batch_size=products.BATCH_SIZE,
        seed=seed,
    )

    def finish() -> dict[str, float]:
        found = products.measured(out / "rloo")
        products.show(found, len(heldout))
        return found

    return Task(products.TASK, len(heldout), model.num_parameters(), None, finish)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("rloo-fast quickstart", (__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of words, weights and sampling [0]")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument(
        "--engine", choices=("hf", "vllm"), default="hf", help="that samples completions [hf]"
    )
    parser.add_argument(
        "--variant",
        choices=("grpo", "tools"),
        help="grpo: train with GRPO's advantages and loss in RLOO's place; tools: another task, to "
        "use a calculator",
    )
    parser.add_argument("--max_steps", type=int, help="training steps, if not the recipe's")
    options = parser.parse_args(argv)
    if options.max_steps is not None and options.max_steps < 2:
        parser.error(
            f"--max_steps must be >= 2 (every second step is logged), got {options.max_steps}"
        )
    return options


def make_problems(seed: int) -> tuple[Dataset, Dataset, Dataset]:
    """(held-out, RLOO's, demonstrated) words, no word in two of them, none a palindrome."""
    from ..data.reasoning_gym_tasks import load_reasoning_gym

    total = NUM_HELDOUT + NUM_RLOO + NUM_DEMONSTRATED
    words = load_reasoning_gym(TASK, total + total // 50, seed * 10**6, **TASK_CONFIG)
    words = words.filter(lambda row: row["answer"].lower() != row["answer"][::-1].lower())
    bounds = (0, NUM_HELDOUT, NUM_HELDOUT + NUM_RLOO, total)
    heldout, train, demonstrated = (
        words.select(range(a, b)) for a, b in itertools.pairwise(bounds)
    )
    return heldout, train, demonstrated


def measure(model_dir: Path, problems: Dataset, seed: int) -> dict[str, Any]:
    """Share of `problems` that a saved model solves: one sample each, and greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..rewards.reasoning_gym import reasoning_gym_reward

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    inputs = tokenizer(problems["prompt"][:], return_tensors="pt", padding=True)
    out: dict[str, Any] = {}
    for way in ("sampled", "greedy"):
        sampling: dict[str, Any] = {"do_sample": way == "sampled"}
        if way == "sampled":
            sampling.update(temperature=TEMPERATURE, top_k=0, top_p=1.0)
        torch.manual_seed(seed)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **sampling)
        texts = tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        rewards = reasoning_gym_reward(texts, problems["task"][:], problems["entry"][:])
        out[way] = sum((reward or 0.0) >= 1 for reward in rewards) / len(rewards)
        out[f"{way}_texts"], out[f"{way}_rewards"] = texts, rewards
    return out


def _train(out: Path, options: argparse.Namespace, prompt: str | None) -> float:
    """`rloo-fast train` on the warm start; returns its seconds. `prompt`: the model card's."""
    from .train_command import main as train

    command = ["--config", "quickstart"]
    command += ["--model_name_or_path", str(out / "warm_start")]
    command += ["--dataset_name", str(out / "train.jsonl")]
    command += ["--eval_dataset_name", str(out / "heldout.jsonl")]
    command += ["--output_dir", str(out / "rloo"), "--seed", str(options.seed)]
    if prompt is not None:
        command += ["--model_card_prompt", prompt]
    if options.variant is not None:
        command += ["--variant", options.variant]
    if options.engine == "vllm":
        command += ["--use_vllm", "True"]
    if options.max_steps is not None:
        command += ["--max_steps", str(options.max_steps)]
    _say(shlex.join(["rloo-fast", "train", *command]))
    start = time.perf_counter()
    train(command)
    return time.perf_counter() - start


def _accuracies(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    return {
        "accuracy_before": before["sampled"],
        "accuracy_after": after["sampled"],
        "greedy_before": before["greedy"],
        "greedy_after": after["greedy"],
    }


def _versions() -> dict[str, str]:
    packages = ("rloo-fast", "torch", "transformers", "datasets", "reasoning-gym")
    return {name: version(name) for name in packages}


def _tokens_per_s(run_dir: Path) -> float:
    """Completion tokens per second of RLOO steps: sampled, scored and trained on; median."""
    from statistics import median

    from ..reports.metrics_file import read_metrics

    key = "throughput/completion_tokens_per_s"
    return round(median(row[key] for row in read_metrics(run_dir) if key in row), 1)


def _show(problems: Dataset, before: dict[str, Any], after: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    samples = Table(title="Held-out words, one sample each")
    for column in ("prompt", "before", "reward", "after", "reward"):
        samples.add_column(column, justify="right" if column == "reward" else "left")
    for i in range(8):
        samples.add_row(
            problems["prompt"][i].split(": ")[-1],
            before["sampled_texts"][i],
            f"{before['sampled_rewards'][i]:.2f}",
            after["sampled_texts"][i],
            f"{after['sampled_rewards'][i]:.2f}",
        )
    table = Table(title=f"Accuracy on {len(problems)} held-out words", min_width=36)
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for way in ("sampled", "greedy"):
        table.add_row(way, f"{before[way]:.3f}", f"{after[way]:.3f}")
    console = Console()
    console.print(samples)
    console.print(table)


def _say_result(out: Path, result: dict[str, Any]) -> None:
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    machine = result["machine"]
    _say(
        f"{result['total_s']:.0f} s in all, {result['train_s']:.0f} s of them RLOO at "
        f"{result['completion_tokens_per_s']:.0f} tokens/s, on {machine['cpu_cores']} cores of "
        f"{machine['cpu']} (load average {machine['load_average_before']} before, "
        f"{machine['load_average_after']} after)."
    )
    _say(f"The model, its card, metrics and curves are in {out / 'rloo'}.")
    _say(f"These figures: {out / 'result.json'}")
    _say(f"To look at the run, its completions token by token: rloo-fast view {out / 'rloo'}")


def _no_progress_bars() -> None:
    """Of reading and writing small files: in a log they are noise."""
    import datasets
    from transformers.utils.logging import disable_progress_bar

    datasets.disable_progress_bars()
    disable_progress_bar()


def _say(line: str) -> None:
    print(line, flush=True)
