"""Runs with tools and environments beside TRL 1.16's GRPOTrainer: a scripted policy, float32.

Both trainers get the same turns, which call tools that answer, fail or are not there, run their own
loop over them, and train on what came of it. `python -m tests.parity.test_tools` prints the table:
case -> largest relative difference of the loss, the gradients and the weights over the steps that
were run, and largest difference of rewards and of the metrics of tools. What reward functions are
given must be equal. Turns that are cut call nothing here: TRL calls, counts and drops the answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.records import Rollout
from tests.parity.test_trl import TOLERANCE, Recorder, relative
from tests.support.tiny import InjectedEngine
from tests.support.tool_chats import call_of, make_chat_model, make_chat_tokenizer
from tests.support.tool_functions import Counter, add, divide, slow_add

pytestmark = pytest.mark.slow

K, STEPS, MAX_NEW = 4, 2, 420
TURN = "<|im_start|>assistant"
SHARED = ("tools/call_frequency", "tools/failure_frequency")
CASES: dict[str, dict[str, Any]] = {
    "grpo, beta 0": {"beta": 0.0},
    "grpo, beta 0.1": {"beta": 0.1},
    "grpo, beta 0.1, 2 iterations": {"beta": 0.1, "num_iterations": 2},
    "dapo, beta 0.1": {"beta": 0.1, "loss": "dapo"},
    "dr_grpo, beta 0": {"beta": 0.0, "loss": "dr_grpo"},
    "at most one round of calls": {"beta": 0.0, "max_tool_calling_iterations": 1},
    "no room for a second answer": {"beta": 0.0, "max_completion_length": 130},
    # by a last turn that was cut; where a tool's answer had no room, TRL does not count it as such
    "truncated trajectories masked": {
        "beta": 0.0, "max_tool_calling_iterations": 1, "mask_truncated_completions": True,
    },
    "an environment with a reward": {"beta": 0.0, "environment": Counter},
    "environments by row": {"beta": 0.0, "environment": {"one": Counter, "two": Counter}},
}  # fmt: skip


class Script(InjectedEngine):
    """Turns that follow from the prompt so far and, the first ones, from their place in the group.

    Calls with right and wrong arguments, of a tool that fails and of one that is not there, several
    in a turn, a call that is no JSON, plain answers, and answers that are cut.
    """

    def __init__(self, tokenizer: Any, has_environment: bool):
        super().__init__()
        self.tokenizer, self.has_environment, self.calls = tokenizer, has_environment, 0

    def text(self, prompt: list[int], place: int) -> str:
        said = self.tokenizer.decode(prompt)
        is_first = said.count(TURN) == 1
        self.calls += is_first and place == 0
        seed = f"{said if not is_first else said[-200:]} {place if is_first else ''} {self.calls}"
        draw = int(hashlib.sha256(seed.encode()).hexdigest(), 16)
        a, b = draw % 17, draw % 13
        kinds = [
            call_of("add", json.dumps({"a": a, "b": b})),
            f"It is {a}.",
            call_of("divide", json.dumps({"a": a, "b": 0})),
            "First:\n" + call_of("slow_add", json.dumps({"a": a, "b": b})),
            call_of("nothing", "{}"),
            f'<tool_call>\n{{"name": "add", "argum{a}\n</tool_call>',
            call_of("add", '{"a": 1}'),
            call_of("add", f'{{"a": {a}, "b": 1}}')
            + "\n"
            + call_of("add", f'{{"a": {b}, "b": 2}}'),
        ]
        if self.has_environment:
            kinds += [call_of("increase", f'{{"by": {a}}}')] * 4
        kind = place if is_first else draw % len(kinds)
        text = kinds[kind % len(kinds)]
        goes_on = draw % 3 == 0 and "<tool_call>" not in text  # until it is cut
        return text + (" And so on." * MAX_NEW if goes_on else "<|im_end|>")

    def ids(self, prompts: list[list[int]], most: int) -> list[list[int]]:
        texts = [self.text(list(ids), i % (2 * K)) for i, ids in enumerate(prompts)]
        return [self.tokenizer(text)["input_ids"][:most] for text in texts]

    def _generate(self, prompt_ids, sampling, seeds, on_finished):
        ids = self.ids(prompt_ids, sampling.max_new_tokens)
        ends = {self.tokenizer.eos_token_id}
        return Rollout(ids, ["stop" if i[-1] in ends else "length" for i in ids])


class Seen:
    """A reward function that keeps what it was given."""

    __name__ = "seen"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, prompts, completions, completion_ids, environments=None, **kwargs):
        counts = None if environments is None else [e.count for e in environments]
        self.calls.append((prompts, completions, completion_ids, counts))
        both = zip(completions, completion_ids, strict=True)
        return [len(str(messages)) % 23 / 10 - sum(ids) % 7 / 5 for messages, ids in both]


def run(trainer_class: Any, config_class: Any, model_dir: Path, out: Path, case: dict[str, Any]):
    settings = {
        "per_device_train_batch_size": 2 * K,
        "num_generations": K,
        "max_completion_length": MAX_NEW,
        "max_steps": STEPS * case.get("num_iterations", 1),
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        **case,
    }
    environment = settings.pop("environment", None)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} and {i + 1}?"}],
            "start": i,
            "environment": ("one", "two")[i % 2],
        }
        for i in range(4 * STEPS)
    ]
    if not isinstance(environment, dict):
        rows = [{k: v for k, v in row.items() if k != "environment"} for row in rows]
    recorder, seen, tokenizer = Recorder(), Seen(), make_chat_tokenizer()
    trainer = trainer_class(
        model=str(model_dir),
        reward_funcs=[seen],
        args=config_class(output_dir=str(out), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[recorder],
        tools=[add, divide, slow_add],
        environment_factory=environment,
    )
    script = Script(tokenizer, environment is not None)
    if trainer_class is RLOOTrainer:
        trainer.rollouts.engine = script
    else:
        most = settings["max_completion_length"]
        trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: (
            script.ids(prompt_ids, most),
            None,
        )
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return recorder, weights, seen


def differences(case: dict[str, Any], tmp: Path) -> dict[str, float]:
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = make_chat_tokenizer()
    make_chat_model(tokenizer).save_pretrained(tmp / "model")
    tokenizer.save_pretrained(tmp / "model")
    settings = {"loss": "grpo", **case}
    ours, our_weights, our_seen = run(
        RLOOTrainer, RLOOConfig, tmp / "model", tmp / "ours", settings | {"advantage": "grpo"}
    )
    loss = settings.pop("loss")
    theirs, their_weights, their_seen = run(
        GRPOTrainer, GRPOConfig, tmp / "model", tmp / "trl", settings | {"loss_type": loss}
    )
    assert our_seen.calls == their_seen.calls
    assert len(ours.gradients) == len(theirs.gradients) == settings.get("num_iterations", 1) * STEPS
    usual = {n: max(g[n].norm() for g in theirs.gradients) for n in theirs.gradients[0]}
    # an on-policy loss is a sum of advantages that cancel: measured against their size
    size = max(max(abs(log["loss"]), log.get("reward_std", 0.0)) for log in theirs.logs)
    steps = list(zip(ours.logs, theirs.logs, strict=True))
    rewards = [name for name in theirs.logs[0] if name.startswith("reward") and "frac" not in name]
    return {
        "loss": max(abs(a["loss"] - b["loss"]) / size for a, b in steps),
        "gradients": max(
            relative(a, b, usual) for a, b in zip(ours.gradients, theirs.gradients, strict=True)
        ),
        "weights": relative(our_weights, their_weights),
        "rewards": max(abs(a[n] - b[n]) for a, b in steps for n in rewards if n in b),
        "tools": max(abs(a[n] - b[n]) for a, b in steps for n in SHARED if n in b),
    }


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_gradients_weights_rewards_and_calls_equal_trl(case, tmp_path):
    found = differences(case, tmp_path)
    assert max(found.values()) <= TOLERANCE, found


def main() -> None:
    torch.set_num_threads(1)
    names = ("loss", "gradients", "weights", "rewards", "tools")
    print(f"{'case':34}", *(f"{name:>9}" for name in names))
    for title, case in CASES.items():
        # both trainers print their logs
        with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()):
            found = differences(case, Path(tmp))
        print(f"{title:34}", *(f"{found[name]:9.1e}" for name in names), flush=True)


if __name__ == "__main__":
    main()
