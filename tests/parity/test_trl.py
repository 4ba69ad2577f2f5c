"""RLOOTrainer beside TRL 1.16's: same model, same injected completions and rewards, float32.

`python -m tests.parity.test_trl` prints the table: case -> largest relative difference of the
loss, the gradients and the weights over the steps that were run.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.records import Rollout
from tests.support.tiny import InjectedEngine, make_model, make_tokenizer

pytestmark = pytest.mark.slow

MAX_NEW = 9
EOS = 1
TOLERANCE = 1e-5

CASES = {
    "beta 0, K 2": dict(beta=0.0),
    "beta 0.05, K 2": dict(),
    "beta 0, K 4": dict(beta=0.0, num_generations=4),
    "beta 0.3, K 4": dict(beta=0.3, num_generations=4),
    "K 4, groups split over micro-batches": dict(
        num_generations=4, per_device_train_batch_size=2, gradient_accumulation_steps=4
    ),
    "truncated completions masked": dict(num_generations=4, mask_truncated_completions=True),
    "temperature 0.6": dict(temperature=0.6),
    "temperature 1.7, beta 0": dict(temperature=1.7, beta=0.0),
    "normalized advantages": dict(num_generations=4, normalize_advantages=True),
    "normalized advantages, beta 0": dict(normalize_advantages=True, beta=0.0),
    "clipped rewards": dict(num_generations=4, reward_clip_range=(-0.4, 0.5)),
    "an unscorable completion": dict(num_generations=4, unscorable=True),
    "unscorable, normalized": dict(num_generations=4, unscorable=True, normalize_advantages=True),
    "num_iterations 2": dict(num_iterations=2, num_generations=4),
    "num_iterations 2, beta 0, clip-high 0.28": dict(num_iterations=2, beta=0.0, epsilon_high=0.28),
    "num_iterations 3, epsilon 0.02": dict(num_iterations=3, epsilon=0.02, num_generations=4),
    "gradient accumulation 4": dict(gradient_accumulation_steps=4),
    "gradient accumulation 4, K 4, num_iterations 2": dict(
        gradient_accumulation_steps=4, num_generations=4, num_iterations=2
    ),
    "gradient checkpointing": dict(gradient_checkpointing=True, num_generations=4),
    "two rewards with weights": dict(two_rewards=True, reward_weights=[0.7, -0.2]),
    "gradient clipping": dict(max_grad_norm=0.05),
    "AdamW": dict(optim="adamw_torch", num_generations=4),
}


def completion(prompt_ids: list[int], sample: int, call: int) -> list[int]:
    """Ragged ids that follow from (prompt, sample, call); every third is cut before its EOS."""
    generator = torch.Generator().manual_seed(sum(prompt_ids) * 1009 + sample * 31 + call * 7)
    length = int(torch.randint(1, MAX_NEW + 1, (), generator=generator))
    ids = torch.randint(6, 32, (length,), generator=generator).tolist()
    if (sample + call + len(prompt_ids)) % 3 == 0:
        return (ids * MAX_NEW)[:MAX_NEW]
    return [*ids[:-1], EOS]


def first_reward(completion_ids, **kwargs):
    return [((sum(ids) * 37) % 101) / 50 - 1 for ids in completion_ids]


def second_reward(completion_ids, **kwargs):
    return [len(ids) / 4 for ids in completion_ids]


def sometimes_none(completion_ids, **kwargs):
    return [None if i % 5 == 2 else r for i, r in enumerate(first_reward(completion_ids))]


class Injected(InjectedEngine):
    """An engine, and a stand-in for TRL's generation, that returns `completion`'s ids."""

    def __init__(self, num_generations: int):
        super().__init__()
        self.num_generations, self.calls = num_generations, 0

    def ids(self, prompt_ids):
        self.calls += 1
        return [
            completion(list(ids), i % self.num_generations, self.calls)
            for i, ids in enumerate(prompt_ids)
        ]

    def _generate(self, prompt_ids, sampling, seeds, on_finished):
        ids = self.ids(prompt_ids)
        return Rollout(ids, ["stop" if i[-1] == EOS else "length" for i in ids])

    def for_trl(self, prompt_ids, images, multimodal_fields):
        return self.ids(prompt_ids)


class Recorder(TrainerCallback):
    """Keeps every step's gradients, as they are when the optimizer takes them, and losses."""

    def __init__(self):
        self.gradients, self.logs = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(dict(logs))


def run(trainer_class, config_class, model_dir, out, case):
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_generations": 2,
        "max_completion_length": MAX_NEW,
        "max_steps": 4,
        "learning_rate": 0.01 if case.get("optim") is None else 1e-3,
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
    unscorable = settings.pop("unscorable", False)
    rewards = [sometimes_none if unscorable else first_reward]
    if settings.pop("two_rewards", False):
        rewards.append(second_reward)
    dataset = Dataset.from_dict(
        {"prompt": [" ".join(f"w{(i * 7 + j) % 26}" for j in range(1 + i % 5)) for i in range(40)]}
    )
    recorder = Recorder()
    trainer = trainer_class(
        model=str(model_dir),
        reward_funcs=rewards,
        args=config_class(output_dir=str(out), **settings),
        train_dataset=dataset,
        processing_class=make_tokenizer(),
        callbacks=[recorder],
    )
    injected = Injected(settings["num_generations"])
    if trainer_class is RLOOTrainer:
        trainer.rollouts.engine = injected
    else:
        trainer._generate_single_turn = injected.for_trl
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return recorder, weights


def relative(ours: dict, theirs: dict, usual: dict | None = None) -> float:
    """Largest |ours - theirs| / |theirs| (2-norms) over the tensors of a model.

    Tensors whose norm is below 1e-6 of the largest (a key bias has no gradient but rounding) are
    measured against the largest. With `usual` norms, a tensor counts as at least a tenth of its
    own: in a step whose rewards nearly tie, an advantage is what is left after cancellation.
    """
    assert ours.keys() == theirs.keys()
    floor = 1e-6 * max(t.norm() for t in theirs.values())
    floor = floor if floor > 0 else torch.tensor(1e-12)
    largest = max(t.norm() for t in theirs.values()).clamp(min=1e-12)

    def size(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.norm() if usual is None else torch.maximum(tensor.norm(), usual[name] / 10)

    return max(
        float((ours[n] - t).norm() / (size(n, t) if t.norm() > floor * 1e3 else largest))
        for n, t in theirs.items()
    )


def differences(case: dict, tmp: Path) -> dict[str, float]:
    from trl import RLOOConfig as TRLConfig
    from trl import RLOOTrainer as TRLTrainer

    make_model().save_pretrained(tmp / "model")
    make_tokenizer().save_pretrained(tmp / "model")
    ours, our_weights = run(RLOOTrainer, RLOOConfig, tmp / "model", tmp / "ours", case)
    theirs, their_weights = run(TRLTrainer, TRLConfig, tmp / "model", tmp / "trl", case)
    assert len(ours.gradients) == len(theirs.gradients) == 4
    usual = {n: max(g[n].norm() for g in theirs.gradients) for n in theirs.gradients[0]}
    # the loss of an on-policy step is a sum of advantages that cancel: measured against their size
    scale = max(abs(log["loss"]) for log in theirs.logs)
    scale = max(scale, max(log.get("reward_std", 0.0) for log in theirs.logs))
    shared = ["reward", "reward_std", "completions/mean_length", "kl", "num_tokens"]
    shared += ["completions/clipped_ratio", "clip_ratio/region_mean", "grad_norm"]
    shared += ["completions/mean_terminated_length", "rewards/first_reward/mean"]
    if case.get("gradient_accumulation_steps", 1) == 1:
        shared.append("entropy")  # else TRL's is a mean of micro-batch means, ours of all tokens
    return {
        "loss": max(
            abs(a["loss"] - b["loss"]) / scale for a, b in zip(ours.logs, theirs.logs, strict=True)
        ),
        "gradients": max(
            relative(a, b, usual) for a, b in zip(ours.gradients, theirs.gradients, strict=True)
        ),
        "weights": relative(our_weights, their_weights),
        "metrics": max(
            abs(a[name] - b[name]) / max(abs(b[name]), 1e-2)
            for a, b in zip(ours.logs, theirs.logs, strict=True)
            for name in shared
            if name in b
        ),
    }


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_gradients_and_weights_equal_trl(case, tmp_path):
    found = differences(case, tmp_path)
    for what, value in found.items():
        bound = TOLERANCE if what != "metrics" else 1e-4
        assert value <= bound, f"{what} differs from TRL's by {value:.2e} relative: {found}"


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'case':50} {'loss':>9} {'gradients':>9} {'weights':>9} {'metrics':>9}")
    for name, case in CASES.items():
        # both trainers print their logs
        with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()):
            found = differences(case, Path(tmp))
        print(f"{name:50} " + " ".join(f"{v:9.1e}" for v in found.values()), flush=True)


if __name__ == "__main__":
    main()
