"""Rows with images: RLOOTrainer beside TRL 1.16's, same completions and rewards, float32.

`python -m tests.parity.test_images` prints the table: family -> largest relative difference of the
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

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.records import Rollout
from tests.parity.test_trl import EOS, MAX_NEW, Injected, Recorder, first_reward, relative
from tests.support.tiny import WORDS
from tests.support.vision import make_processor, make_vision_model, picture

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
STEPS = 2
# with rows of two images and, where TRL's own batches take them, of none
CASES = {
    "qwen2_5_vl": dict(layout="padded"),
    "qwen2_5_vl shared_prefix": dict(layout="shared_prefix"),
    "qwen3_vl shared_prefix": dict(layout="shared_prefix"),
    "idefics3 packed": dict(layout="packed"),
    "llava": dict(layout="padded", beta=0.0),
    "gemma3": dict(layout="padded"),
}


def seeing(completion_ids, images, prompts, **kwargs):
    """A reward that only functions with the images among their columns can give."""
    pixels = [sum(image.getpixel((3, 3))[0] for image in row) for row in images]
    shown = [
        sum(part["type"] == "image" for part in messages[0]["content"]) for messages in prompts
    ]
    assert shown == [len(row) for row in images]
    return [r + p / 500 for r, p in zip(first_reward(completion_ids), pixels, strict=True)]


class InjectedWithImages(Injected):
    takes_images = True

    def _generate_with_images(self, prompt_ids, inputs, sampling, seeds, on_finished):
        ids = self.ids(prompt_ids)
        return Rollout(ids, ["stop" if i[-1] == EOS else "length" for i in ids])


def rows(with_empty: bool) -> Dataset:
    numbers = [1, 2, 0] if with_empty else [1, 2, 2]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": " ".join(WORDS[i : i + i % 4])}],
                "images": [picture(10 * i + j, 16 + 8 * j) for j in range(numbers[i % 3])],
            }
            for i in range(1, 13)
        ]
    )  # fmt: skip


def run(trainer_class, config_class, family, model_dir, out, case):
    settings = {
        "per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "num_generations": 2,
        "max_completion_length": MAX_NEW, "max_steps": STEPS, "learning_rate": 0.01,
        "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "shuffle_dataset": False, "gradient_checkpointing": False, **case,
    }  # fmt: skip
    if trainer_class is not RLOOTrainer:
        settings.pop("layout")
    recorder = Recorder()
    trainer = trainer_class(
        model=str(model_dir),
        reward_funcs=seeing,
        args=config_class(output_dir=str(out), **settings),
        train_dataset=rows(with_empty=family.startswith("qwen")),
        processing_class=make_processor(family),
        callbacks=[recorder],
    )
    injected = InjectedWithImages(settings["num_generations"])
    if trainer_class is RLOOTrainer:
        trainer.rollouts.engine = injected
    else:
        trainer._generate_single_turn = injected.for_trl
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return recorder, weights


def differences(name: str, tmp: Path) -> dict[str, float]:
    from trl import RLOOConfig as TRLConfig
    from trl import RLOOTrainer as TRLTrainer

    family, case = name.split()[0], CASES[name]
    make_vision_model(family).save_pretrained(tmp / "model")
    make_processor(family).tokenizer.save_pretrained(tmp / "model")
    ours, our_weights = run(RLOOTrainer, RLOOConfig, family, tmp / "model", tmp / "ours", case)
    theirs, their_weights = run(TRLTrainer, TRLConfig, family, tmp / "model", tmp / "trl", case)
    assert len(ours.gradients) == len(theirs.gradients) == STEPS
    tower = [n for n in theirs.gradients[0] if "vis" in n]
    assert tower
    assert any(theirs.gradients[0][n].norm() > 0 for n in tower)
    scale = max(max(abs(log["loss"]), log["reward_std"]) for log in theirs.logs)
    usual = {n: max(g[n].norm() for g in theirs.gradients) for n in theirs.gradients[0]}
    pairs = list(zip(ours.logs, theirs.logs, strict=True))
    return {
        "loss": max(abs(a["loss"] - b["loss"]) / scale for a, b in pairs),
        "gradients": max(
            relative(a, b, usual) for a, b in zip(ours.gradients, theirs.gradients, strict=True)
        ),
        "weights": relative(our_weights, their_weights),
        "metrics": max(
            abs(a[m] - b[m]) / max(abs(b[m]), 1e-2)
            for a, b in pairs
            for m in ("reward", "kl", "entropy", "num_tokens", "completions/mean_length")
            if m in b
        ),
    }


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_weights_equal_trl(name, tmp_path):
    found = differences(name, tmp_path)
    for what, value in found.items():
        bound = TOLERANCE if what != "metrics" else 1e-4
        assert value <= bound, f"{what} differs from TRL's by {value:.2e} relative: {found}"


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'family':30} {'loss':>9} {'gradients':>9} {'weights':>9} {'metrics':>9}")
    for name in CASES:
        # both trainers print their logs
        with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()):
            found = differences(name, Path(tmp))
        print(f"{name:30} " + " ".join(f"{v:9.1e}" for v in found.values()), flush=True)


if __name__ == "__main__":
    main()
