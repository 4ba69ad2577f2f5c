"""The update on conversations of several turns with tools: tokens and seconds, beside TRL.

    python -m benchmarks.step.turns --json FILE

P prompts (tools and a question) that all begin with the tools, K trajectories of each, T turns of a
trajectory: a turn is reasoning and a call, and between turns a tool says something. Random ids.

    kept      turns keep their reasoning: a trajectory is one sequence
    dropped   the chat template drops the reasoning of earlier turns: T sequences, of each of which
              the last turn is trained

    trl            GRPOTrainer, padded rows with a mask, its head on sampled positions only, as on
                   a GPU; of `dropped`, which it does not make by itself, each turn as a row
    trl_tree       tokens of TRL's packing of its asynchronous trainer, where a sequence shares what
                   it begins like another one with; on a GPU only, so that there are no seconds
    ours_padded, ours_packed, ours       RLOOTrainer in a layout, "auto" the last: a tree

The losses are alike ("grpo", beta 0, no pass before the update). Gate, on the first update from
common weights: loss and norm of the gradient equal the first provider's; of `dropped` trl is left
out of it, as there each turn has a reward of its own. Seconds of an optimizer step whose
completions are there at once, in turn.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from benchmarks.common import harness
from benchmarks.common import models as step_models
from benchmarks.common.harness import Row
from benchmarks.step.providers import Passes, Watch, head_as_on_a_gpu
from benchmarks.step.run import take_turns
from rloo_fast.records import Rollout, Strand, Trajectory

LAYOUTS = {"ours_padded": "padded", "ours_packed": "packed", "ours": "auto"}
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Shape:
    """Tokens of each part."""

    num_prompts: int = 2
    num_generations: int = 2
    turns: int = 6
    tools: int = 300
    question: int = 30
    reasoning: int = 48
    call: int = 16
    said: int = 32

    def described(self, case: str) -> str:
        return (
            f"{case} P={self.num_prompts} K={self.num_generations} {self.turns} turns of "
            f"{self.reasoning}+{self.call}, tools {self.tools}+{self.question}, said {self.said}"
        )


def trajectories(shape: Shape, case: str, vocab: int) -> list[tuple[list[int], list[Strand]]]:
    """(prompt, its strands, with the prompt) of each row, prompt-major."""
    draw = random.Random(0)
    ids = lambda n: [draw.randrange(step_models.NUM_SPECIAL, vocab) for _ in range(n)]  # noqa: E731
    tools, found = ids(shape.tools), []
    for _ in range(shape.num_prompts):
        prompt = tools + ids(shape.question)
        for _ in range(shape.num_generations):
            history, counted = [*prompt], list[int]()
            strands: list[Strand] = []
            for turn in range(shape.turns):
                reasoning, call = ids(shape.reasoning), ids(shape.call)
                is_last = turn == shape.turns - 1
                call[-1] = step_models.EOS if is_last else call[-1]
                said = [] if is_last else ids(shape.said)
                whole = history + reasoning + call
                places = [*range(len(history), len(whole))]
                if case == "dropped":
                    strands.append(Strand(whole, places))
                    history = history + call + said
                else:
                    counted += places
                    history = whole + said
            found.append((prompt, strands or [Strand(history, counted)]))
    return found


class Session:
    """What `collector.open_session` gives: these trajectories, without an engine."""

    environments = None

    def __init__(self, rows: list[Any], made: list[tuple[list[int], list[Strand]]]):
        self.rows = [replace(row, ids=prompt) for row, (prompt, _) in zip(rows, made, strict=True)]
        self.made, self.texts = made, {row: "" for row in range(len(rows))}

    def sample(self, seeds: list[int], mode: str, finished: Any) -> Rollout:
        return Rollout(
            [strands[-1].ids[len(prompt) :] for prompt, strands in self.made],
            ["stop"] * len(self.made),
            trajectories=[Trajectory(strands, []) for _, strands in self.made],
        )


class Steps:
    """A trainer whose every step updates on the same trajectories."""

    def __init__(self, name: str, shape: Shape, case: str, folder: str):
        self.watch, self.passes = Watch("cpu"), Passes()
        vocab = step_models.model_config(self._model(folder)).vocab_size
        made = trajectories(shape, case, vocab)
        rows = [(prompt, [strand]) for prompt, strands in made for strand in strands]
        self.is_trl = is_trl = name == "trl"
        per_prompt = shape.num_generations * (len(made[0][1]) if is_trl else 1)
        arguments: dict[str, Any] = {
            "output_dir": folder, "per_device_train_batch_size": shape.num_prompts * per_prompt,
            "num_generations": per_prompt, "max_completion_length": 1500, "beta": 0.0,
            "max_steps": 1, "learning_rate": 0.0, "optim": "sgd", "max_grad_norm": 0.0,
            "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "save_strategy": "no",
            "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
            "shuffle_dataset": False, "model_init_kwargs": {"dtype": "float32"},
        }  # fmt: skip
        common: dict[str, Any] = {
            "model": folder,
            "reward_funcs": step_models.fixed_reward,
            "train_dataset": Dataset.from_dict({"prompt": ["w1"] * shape.num_prompts}),
            "processing_class": step_models.make_tokenizer(),
            "callbacks": [self.watch],
        }
        if is_trl:
            from trl.trainer.grpo_config import GRPOConfig
            from trl.trainer.grpo_trainer import GRPOTrainer

            config: Any = GRPOConfig(**arguments, loss_type="grpo")
            self.trainer: Any = GRPOTrainer(args=config, rollout_func=_told(rows), **common)
        else:
            from rloo_fast import RLOOConfig, RLOOTrainer

            config = RLOOConfig(**arguments, loss="grpo", advantage="grpo", layout=LAYOUTS[name])
            self.trainer = RLOOTrainer(args=config, **common)

            @contextmanager
            def open_session(asked: list[Any], sampling: Any) -> Iterator[Session]:
                yield Session(asked, made)

            self.trainer.collector.open_session = open_session
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.model.get_input_embeddings().register_forward_hook(self.passes.hook)

    @staticmethod
    def _model(folder: str) -> str:
        return Path(folder).name

    def update(self) -> float:
        self.passes.reset()
        with head_as_on_a_gpu() if self.is_trl else nullcontext():
            self.trainer.train()
        return self.watch.seconds

    def first_update(self) -> tuple[float, float]:
        """(loss, norm of the gradient)"""
        self.update()
        return float(self.watch.logs["loss"]), float(self.watch.logs["grad_norm"])


def _told(rows: list[tuple[list[int], list[Strand]]]) -> Any:
    """A rollout_func of GRPOTrainer that returns these rows."""

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        completions, masks = [], []
        for prompt, (strand,) in rows:
            completions.append(strand.ids[len(prompt) :])
            counted = {*strand.counted}
            masks.append([int(p in counted) for p in range(len(prompt), len(strand.ids))])
        return {
            "prompt_ids": [prompt for prompt, _ in rows],
            "completion_ids": completions,
            "env_mask": masks,
            "logprobs": None,
        }

    return rollout


def trl_tree_tokens(shape: Shape, case: str) -> int:
    """Positions of one row of TRL's tree packing with all sequences, as far as they are trained."""
    from trl.experimental.async_grpo.packing import TreeRow

    row = TreeRow()
    made = trajectories(shape, case, 50_000)
    for number, (_, strands) in enumerate(made):
        for strand in strands:
            mask = torch.zeros(len(strand.ids))
            mask[strand.counted] = 1
            row.add({
                "input_ids": torch.tensor(strand.ids), "completion_mask": mask,
                "old_log_probs": torch.zeros(len(mask)), "advantage": 0.0, "group_id": number,
            })  # fmt: skip
    return len(row.pack()["input_ids"])


def run(case: str, shape: Shape, model: str, runs: int) -> list[Row]:
    told = f"{shape.described(case)} {model}"
    names = ["trl", "trl_tree", *LAYOUTS]
    rows = {name: Row("turns", name, told, "cpu", "float32") for name in names}
    with tempfile.TemporaryDirectory() as root:
        folder = str(Path(root) / model)
        step_models.save_model(model, folder)
        steps = {name: Steps(name, shape, case, folder) for name in names if name != "trl_tree"}
        first = {name: one.first_update() for name, one in steps.items()}
        print(f"{case}, loss and norm of the gradient: {first}", flush=True)
        gated = [name for name in first if case == "kept" or name != "trl"]
        loss, norm = first[gated[0]]
        for name in gated:
            off = abs(first[name][0] - loss) + abs(first[name][1] - norm) / norm
            rows[name].error_vs_reference = off
            assert off <= TOLERANCE, (name, first)
        seconds = take_turns({name: one.update for name, one in steps.items()}, runs, case)
        for name, times in seconds.items():
            rows[name].set_times(times)
            rows[name].tokens = steps[name].passes.tokens
            rows[name].add_note(str(steps[name].passes))
    rows["trl_tree"].tokens = trl_tree_tokens(shape, case)
    rows["trl_tree"].skipped = "its attention needs a GPU: tokens alone"
    return list(rows.values())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step.turns", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cases", default="kept,dropped")
    parser.add_argument("--model", choices=step_models.MODELS, default="pythia-14m")
    parser.add_argument("--turns", type=int, default=Shape.turns)
    parser.add_argument("--num-generations", type=int, default=Shape.num_generations)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", help="write env and rows here")
    args = parser.parse_args(argv)
    shape = Shape(turns=args.turns, num_generations=args.num_generations)
    rows = [
        row for case in args.cases.split(",") for row in run(case, shape, args.model, args.runs)
    ]
    print(harness.format_table(rows, baseline="trl"))
    if args.json:
        harness.write_json(args.json, harness.environment(), rows)


if __name__ == "__main__":
    main()
