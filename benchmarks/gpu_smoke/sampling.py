"""(e) Tokens per second with and without seeds; (f) what the sampler check can see in bfloat16.

(f) trains a policy for some steps and loads its weights into the engine, all or all but some:

    gap = mean over sampled tokens of |log-prob of the sampler - log-prob of the trainer|

in nats, at temperature 1. The weights are random ones, with a head that is scaled until logits
spread as a trained model's do.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rloo_fast.records import Rollout, Sampling

from .part import Smoke
from .samplers import Sampler
from .shapes import make_model

RUNS = 3
STEPS = 20
LEARNING_RATE = 1e-5
LOGIT_STD = 2.5
NORM, MATRIX = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"


class Sizes(NamedTuple):
    shape: str
    rows: int
    prompt: int
    new: int


ROLLOUT = {False: Sizes("0.5b", 256, 256, 256), True: Sizes("tiny", 4, 8, 4)}  # by dry
CHECK = {False: Sizes("0.5b", 64, 64, 64), True: Sizes("tiny", 4, 8, 8)}


def run_rollout(smoke: Smoke) -> None:
    sizes = ROLLOUT[smoke.dry]
    model = make_model(sizes.shape, smoke.device.device, tied=False)
    prompts = _prompts(sizes, model)
    sampler = Sampler(model, smoke, max_length=sizes.prompt + sizes.new)
    sampler.load(model.state_dict())
    ways: dict[str, list[Any]] = {"tokens_per_s": list(range(sizes.rows))}
    if smoke.engine == "vllm":
        ways["tokens_per_s_without_seeds"] = [None] * sizes.rows
    smoke.record(engine=smoke.engine)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    tokens, not_finite = 0, 0
    for round_ in range(RUNS + 1):  # the first warms up
        for way, seeds in ways.items():
            sampler.load(model.state_dict())  # which empties the prefix cache
            smoke.device.synchronize()
            start = time.perf_counter()
            rollout = sampler.generate(prompts, _sampling(sizes), seeds)
            elapsed = time.perf_counter() - start
            tokens = sum(map(len, rollout.completion_ids))
            not_finite += _not_finite(rollout)
            if round_:
                seconds[way].append(elapsed)
    rates = {way: tokens / statistics.median(found) for way, found in seconds.items()}
    smoke.record(**rates, tokens=tokens, logps_not_finite=not_finite)
    if len(rates) == 2:
        # a few tokens on a host say nothing
        share = rates["tokens_per_s"] / rates["tokens_per_s_without_seeds"]
        smoke.record(seeds_share=share if smoke.device.is_cuda else None)
    sampler.close()


def run_sampler_check(smoke: Smoke) -> None:
    sizes = CHECK[smoke.dry]
    policy = make_model(sizes.shape, smoke.device.device, tied=False)
    prompts = _prompts(sizes, policy)
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor(prompts[:4], device=policy.device)).logits
        policy.lm_head.weight.mul_(LOGIT_STD / logits.std())
    sampler = Sampler(policy, smoke, max_length=sizes.prompt + sizes.new)
    smoke.record(engine=smoke.engine)

    def gap(weights: dict[str, Tensor]) -> float:
        sampler.load(weights)
        rollout = sampler.generate(prompts, _sampling(sizes), range(sizes.rows))
        assert rollout.logps is not None
        with torch.no_grad():
            trainer = _logps(policy, prompts, rollout)
        there = torch.tensor(rollout.logps, device=trainer.device)
        return float((there - trainer).abs().mean())

    first = _weights(policy)
    noise = gap(first)
    smoke.record(noise=noise)
    sampler.load(first)
    rollout = sampler.generate(prompts, _sampling(sizes), range(sizes.rows))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    before = first
    for _ in range(STEPS):
        before = _weights(policy)
        _step(policy, optimizer, prompts, rollout)
    now = _weights(policy)
    smoke.record(stale_step=gap(before), stale_all=gap(first))
    for name, parameter in (("stale_norm", NORM), ("stale_matrix", MATRIX)):
        smoke.record(**{name: gap({**now, parameter: first[parameter]})})
    torch.manual_seed(1)
    other = {name: w + 0.1 * w.std() * torch.randn_like(w) for name, w in now.items()}
    smoke.record(other_policy_over_noise=gap(other) / noise)
    smoke.record(noise_after_planting=gap(now))
    sampler.close()


def _prompts(sizes: Sizes, model: Any) -> list[list[int]]:
    torch.manual_seed(2)
    ids = torch.randint(1, model.config.vocab_size, (sizes.rows, sizes.prompt))
    return ids.tolist()


def _sampling(sizes: Sizes) -> Sampling:
    """From the whole distribution, to the limit."""
    return Sampling(
        temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0,
        max_new_tokens=sizes.new, stop_token_ids=(),
    )  # fmt: skip


def _not_finite(rollout: Rollout) -> int:
    assert rollout.logps is not None
    return sum(not math.isfinite(logp) for row in rollout.logps for logp in row)


def _weights(policy: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in policy.state_dict().items()}


def _logps(policy: Any, prompts: list[list[int]], rollout: Rollout) -> Tensor:
    """(B, L) of the completions, all of L tokens, computed in bfloat16 as the trainer does."""
    ids = torch.tensor(rollout.completion_ids, device=policy.device)
    rows = torch.cat([torch.tensor(prompts, device=policy.device), ids], 1)
    found = []
    for part, chosen in zip(rows.split(8), ids.split(8), strict=True):
        with torch.autocast(policy.device.type, torch.bfloat16):
            logits = policy(input_ids=part, logits_to_keep=ids.shape[1] + 1).logits[:, :-1]
        logps = logits.float().log_softmax(-1)
        found.append(logps.gather(2, chosen[..., None])[..., 0])
    return torch.cat(found)


def _step(policy: Any, optimizer: Any, prompts: list[list[int]], rollout: Rollout) -> None:
    """One step on a few rows, with advantages +1 and -1."""
    few = Rollout(rollout.completion_ids[:4], rollout.finish_reasons[:4])
    logps = _logps(policy, prompts[:4], few)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], device=logps.device)
    (-(advantages * logps.mean(1)).mean()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
