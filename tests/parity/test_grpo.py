"""GRPO's losses beside TRL 1.16's GRPOTrainer: same model, injected completions, float32.

`python -m tests.parity.test_grpo` prints the table: case -> largest relative difference of the
loss, the gradients, their norm and the weights over the steps that were run.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.step.buffer import RolloutBuffer
from tests.parity.test_trl import TOLERANCE, Injected, relative, run
from tests.support.tiny import make_model, make_tokenizer

# our advantage for TRL's scale_rewards
SCALES = {"group": "grpo", "none": "dr_grpo"}
# Steps of two micro-steps, of completions of 1 to 9 tokens. Steps are large, so that reference,
# sampling policy and policy differ, and ratios are clipped.
BASE: dict[str, Any] = {
    "num_generations": 4, "gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 0.05,
    "epsilon": 0.1, "epsilon_high": 0.15,
}  # fmt: skip
GRID = {
    f"{loss}, beta {beta}, {times} iteration{'s' * (times - 1)}, scale_rewards {scale}": {
        "loss": loss, "beta": beta, "num_iterations": times, "scale": scale,
    }
    for loss, beta, times, scale in itertools.product(
        ("grpo", "dapo", "dr_grpo", "bnpo"), (0.0, 0.1), (1, 2), SCALES
    )
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "dapo, beta 0.1, half a batch per step, masked": {
        "loss": "dapo", "beta": 0.1, "mask_truncated_completions": True,
        "gradient_accumulation_steps": 1, "steps_per_generation": 2,
    },
    "grpo, beta 0.1, masked, no bias correction": {
        "loss": "grpo", "beta": 0.1, "mask_truncated_completions": True, "num_iterations": 2,
        "use_bias_correction_kl": False,
    },
    "grpo, beta 0.1, unscorable completions": {"loss": "grpo", "beta": 0.1, "unscorable": True},
    "dr_grpo, unscorable completions, scale_rewards none": {
        "loss": "dr_grpo", "beta": 0.0, "unscorable": True, "scale": "none",
    },
    "bnpo, beta 0.1, groups larger than a micro-step": {
        "loss": "bnpo", "beta": 0.1, "num_generations": 8,
    },
}  # fmt: skip
CASES = GRID | MORE
# of the grid, a quarter: each loss with both values of each setting, each combination of these once
QUARTER = [name for i, name in enumerate(GRID) if i % 8 in (i // 8, 7 - i // 8)]
TESTED = {name: CASES[name] for name in [*QUARTER, *MORE]}


class InjectedForTRL(Injected):
    def for_trl(self, prompt_ids, images, multimodal_fields, num_generations):
        return self.ids(prompt_ids), None


def rows_in_order(buffer, number, iteration, samples):
    return list(range(samples.num_rows))


def differences(case: dict[str, Any], tmp: Path) -> dict[str, float]:
    from trl import GRPOConfig, GRPOTrainer

    settings = BASE | case
    loss, scale = settings.pop("loss"), settings.pop("scale", "group")
    make_model().save_pretrained(tmp / "model")
    make_tokenizer().save_pretrained(tmp / "model")
    with (  # both cut a generation batch into micro-steps as its prompts come
        mock.patch.object(RolloutBuffer, "_order", rows_in_order),
        mock.patch("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch),
        mock.patch("tests.parity.test_trl.Injected", InjectedForTRL),
    ):
        ours, our_weights = run(
            RLOOTrainer, RLOOConfig, tmp / "model", tmp / "ours",
            settings | {"loss": loss, "advantage": SCALES[scale]},
        )  # fmt: skip
        theirs, their_weights = run(
            GRPOTrainer, GRPOConfig, tmp / "model", tmp / "trl",
            settings | {"loss_type": loss, "scale_rewards": scale},
        )  # fmt: skip
    assert len(ours.gradients) == len(theirs.gradients) == settings["max_steps"]
    usual = {n: max(g[n].norm() for g in theirs.gradients) for n in theirs.gradients[0]}
    # an on-policy loss is a sum of advantages that cancel: measured against their size
    size = max(1e-2, *(abs(log["loss"]) for log in theirs.logs))
    steps = list(zip(ours.logs, theirs.logs, strict=True))
    return {
        "loss": max(abs(a["loss"] - b["loss"]) / size for a, b in steps),
        "gradients": max(
            relative(a, b, usual) for a, b in zip(ours.gradients, theirs.gradients, strict=True)
        ),
        "grad norm": max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in steps),
        "weights": relative(our_weights, their_weights),
    }


@pytest.mark.parametrize("case", TESTED.values(), ids=TESTED.keys())
def test_loss_gradients_and_weights_equal_trl(case, tmp_path):
    found = differences(case, tmp_path)
    assert max(found.values()) <= TOLERANCE, found


def main() -> None:
    torch.set_num_threads(1)
    names = ("loss", "gradients", "grad norm", "weights")
    print(f"{'case':52}", *(f"{name:>9}" for name in names))
    for title, case in CASES.items():
        # both trainers print their logs
        with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()):
            found = differences(case, Path(tmp))
        print(f"{title:52}", *(f"{found[name]:9.1e}" for name in names), flush=True)


if __name__ == "__main__":
    main()
