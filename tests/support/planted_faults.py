"""Planted faults: ways in which the policy that samples is not the one that is trained.

    python -m tests.support.planted_faults [FAULT ...]

prints for each fault and dtype what the log-probs of the real vLLM engine differ by and what
catches it. The run has its measure by then: a fault is planted after PLANTED_AFTER steps.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from rloo_fast.rollout.engine import EngineError, EngineState, StaleWeights
from rloo_fast.weight_sync.buckets import weight_buckets
from rloo_fast.weight_sync.sampler_check import SamplerMismatch

PLANTED_AFTER, MAX_STEPS = 6, 10
# weights move by a few percent in the steps before
RUN = {"max_steps": MAX_STEPS, "learning_rate": 2e-3}
DTYPES: dict[str, dict[str, Any]] = {"float32": {}, "bf16": {"bf16": True}}
Weights = dict[str, torch.Tensor]  # of the policy when the run began


def skipped_sync(trainer, initial: Weights):
    trainer.rollouts._sync = lambda version, mode: None


def skipped_sync_that_claims_to_have_been_made(trainer, initial: Weights):
    real, engine = trainer.rollouts._sync, trainer.rollouts.engine

    def forged(version, mode):
        if version == 1:
            return real(version, mode)
        engine.state, engine.version = EngineState.SYNCED, version

    trainer.rollouts._sync = forged


def sync_of_the_step_before(trainer, initial: Weights):
    last: list[Weights] = []

    def weights():
        last.append({n: t.clone() for b in weight_buckets(trainer.model, 2**20) for n, t in b})
        yield list(last[max(0, len(last) - 2)].items())

    trainer.rollouts.weights = weights


def version_that_is_not_counted(trainer, initial: Weights):
    real = trainer.rollouts.engine.generate

    def generate(*args, version, **kwargs):
        return real(*args, version=version + 1, **kwargs)

    trainer.rollouts.engine.generate = generate


def one_parameter_skipped(trainer, initial: Weights):
    def weights():
        for bucket in weight_buckets(trainer.model, 2**20):
            yield [(n, t) for n, t in bucket if not n.endswith("layers.1.self_attn.k_proj.weight")]

    trainer.rollouts.weights = weights


def one_parameter_as_at_first(trainer, initial: Weights):
    """A small one: 1 of 23 tensors, 4096 of 66 thousand numbers."""

    def weights():
        for bucket in weight_buckets(trainer.model, 2**20):
            yield [(n, initial[n] if n.endswith("layers.1.self_attn.o_proj.weight") else t)
                   for n, t in bucket]  # fmt: skip

    trainer.rollouts.weights = weights


def initial_checkpoint_reloaded_after_wake(trainer, initial: Weights):
    engine = trainer.rollouts.engine
    wake = engine._wake

    def reload(tag):
        wake(tag)
        if tag == "kv_cache":
            engine.llm.apply_model(lambda model: model.load_weights(iter(initial.items())) and None)

    engine._wake = reload


def tied_head_left_stale(trainer, initial: Weights):
    """As a linear layer that computes with a packed copy of its weight."""

    def pack(model):
        kept, first = model.lm_head.weight.detach().clone(), initial["model.embed_tokens.weight"]
        kept[: len(first)] = first  # the rest is padding
        method = model.lm_head.quant_method
        method.apply = lambda layer, x, bias=None: torch.nn.functional.linear(x, kept, bias)

    trainer.rollouts.engine.llm.apply_model(pack)


def prefix_cache_not_reset(trainer, initial: Weights):
    trainer.rollouts.engine.llm.reset_prefix_cache = lambda: True


def wrong_temperature(trainer, initial: Weights):
    engine = trainer.rollouts.engine
    params = engine._params

    def warmer(sampling, seed, num_prompt):
        made = params(sampling, seed, num_prompt)
        made.temperature = 1.2
        return made

    engine._params = warmer


# fault -> model, error and sentence of a run in float32 at the tests' learning rate, from the start
FAULTS: dict[Callable[[Any, Weights], None], tuple[str, type[Exception], str]] = {
    skipped_sync: ("llama", EngineError, "must be 'synced"),
    skipped_sync_that_claims_to_have_been_made: ("llama", SamplerMismatch, "differ"),
    sync_of_the_step_before: ("llama", SamplerMismatch, "differ"),
    version_that_is_not_counted: ("llama", StaleWeights, "the policy is at"),
    one_parameter_skipped: ("llama", EngineError, r"layers\.1\.self_attn\.qkv_proj\.weight"),
    one_parameter_as_at_first: ("llama", SamplerMismatch, "differ"),
    initial_checkpoint_reloaded_after_wake: ("llama", SamplerMismatch, "differ"),
    tied_head_left_stale: ("qwen2-tied", SamplerMismatch, "differ"),
    prefix_cache_not_reset: ("llama", SamplerMismatch, "differ"),
    wrong_temperature: ("llama", SamplerMismatch, "differ"),
}


def initial_weights(trainer) -> Weights:
    return {n: t.clone() for b in weight_buckets(trainer.model, 2**20) for n, t in b}


@dataclass
class Planted(TrainerCallback):
    """Plants `fault` after PLANTED_AFTER steps of `trainer`."""

    trainer: Any
    fault: Callable[[Any, Weights], None]

    def __post_init__(self):
        self.initial = initial_weights(self.trainer)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == PLANTED_AFTER:
            self.fault(self.trainer, self.initial)


@dataclass
class Seen:
    """What became of a run."""

    means: list[float]  # that were judged, one per step
    warned: list[int]  # steps
    caught: str  # by what, and in which step; "": the run went on to its end
    limits: tuple[float, float]


def outcome(trainer, fault: Callable[[Any, Weights], None] | None) -> Seen:
    """Train with the fault planted on the way; None: without."""
    check, means, warned = trainer.sampler_check, [], []
    judge, warn = check.judge, check._warn

    def judged(rows, *args, **kwargs):
        means.append(float(rows["logp_diff_outside"].sum() / rows["logp_diff_tokens"].sum()))
        judge(rows, *args, **kwargs)

    def noted(*args):
        warned.append(trainer.state.global_step + 1)
        warn(*args)

    check.judge, check._warn = judged, noted
    if fault is not None:
        trainer.add_callback(Planted(trainer, fault))
    caught = ""
    try:
        with redirect_stdout(sys.stderr):
            trainer.train()
    except SamplerMismatch:
        caught = "log-probs"
    except StaleWeights:
        caught = "versions"
    except EngineError as error:
        caught = "sync" if "cover" in str(error) else "states"
    finally:
        trainer.rollouts.close()
    if caught:
        caught += f", step {trainer.state.global_step + 1}"
    return Seen(means, warned, caught, (check.limits.warn, check.limits.stop))


def row(name: str, dtype: str, seen: Seen) -> str:
    before, after = seen.means[:PLANTED_AFTER], seen.means[PLANTED_AFTER:]
    found = seen.caught or (f"a warning, step {seen.warned[0]}" if seen.warned else "nothing")
    return (
        f"| {name} | {dtype} | {max(before):.1e} | {seen.limits[0]:.1e}, {seen.limits[1]:.1e} | "
        f"{', '.join(f'{mean:.1e}' for mean in after) or '-'} | {found} |"
    )


def main(names: list[str]) -> None:
    from tests.end_to_end.test_train_vllm import make_trainer

    print("| planted after 6 steps | dtype | before | warns, stops at | with it | caught by |")
    print("| --- | --- | --- | --- | --- | --- |")
    for fault in (None, *FAULTS):
        name = fault.__name__ if fault else "nothing"
        if names and name not in names:
            continue
        for dtype, fields in DTYPES.items():
            model = FAULTS[fault][0] if fault else "llama"
            with tempfile.TemporaryDirectory() as folder:
                seen = outcome(make_trainer(folder, model, **RUN, **fields), fault)
            print(row(name.replace("_", " "), dtype, seen), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
