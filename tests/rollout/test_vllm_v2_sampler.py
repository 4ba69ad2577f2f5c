"""vLLM's V2 sampler, which runs on CUDA alone, in Triton's interpreter: what a request with our
fields draws and reports.

Its CPU build ships the files and switches Triton off; the worker gives it back to them. Not here:
top-k and top-p, whose kernel loops in a form that the interpreter does not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rloo_fast.data.seeds import step_seed
from tests.support.tiny import require_vllm
from tests.support.triton_process import run_worker

require_vllm()
pytestmark = [pytest.mark.slow, pytest.mark.vllm]

REPORTED = [  # (vocabulary, dtype, temperature, min_p)
    (7, "float32", 1.0, 0.0), (7, "float32", 0.7, 0.0), (1027, "float32", 1.3, 0.0),
    (1027, "float32", 1.0, 0.2), (1500, "bfloat16", 1.0, 0.0), (1500, "bfloat16", 0.7, 0.0),
]  # fmt: skip
PROBABILITIES = [0.5, 0.3, 0.2]
NUM_DRAWS = 400  # 15 ms each

# --- in the worker, where TRITON_INTERPRET=1


class V2Sampler:
    """vLLM's own, on a CPU."""

    def __init__(self, num_requests: int, vocabulary: int):
        from vllm.config import VllmConfig
        from vllm.v1.worker.gpu.sample.sampler import Sampler
        from vllm.v1.worker.gpu.states import RequestState

        device = torch.device("cpu")
        states = RequestState(num_requests, 64, 64, 0, vocabulary, device)
        self.sampler = Sampler(
            VllmConfig(), num_requests, vocabulary, device, states, "processed_logprobs"
        )

    def __call__(
        self, logits, seeds, positions, temperature=1.0, min_p=0.0, with_logprobs=True
    ) -> Any:
        """(next token of each request, its log-prob), sampled as VLLMEngine asks for it."""
        from vllm import SamplingParams

        from rloo_fast.records import Sampling
        from rloo_fast.rollout.vllm.colocate import sampling_fields

        sampling = Sampling(
            temperature=temperature, top_p=1.0, top_k=0, min_p=min_p, repetition_penalty=1.0,
            max_new_tokens=4, stop_token_ids=(1,),
        )  # fmt: skip
        fields = sampling_fields(sampling)
        if not with_logprobs:
            del fields["logprobs"]
        for index, seed in enumerate(seeds):
            self.sampler.add_request(index, SamplingParams(**fields, seed=seed))
        self.sampler.apply_staged_writes()
        rows = torch.arange(len(seeds))
        batch = SimpleNamespace(
            num_reqs=len(rows),
            idx_mapping=rows,
            idx_mapping_np=rows.numpy(),
            expanded_idx_mapping=rows,
            expanded_local_pos=torch.zeros_like(rows),
            cu_num_logits=torch.arange(len(rows) + 1),
            cu_num_logits_np=torch.arange(len(rows) + 1).numpy(),
            logits_indices=rows,
            positions=torch.tensor(positions),
            input_ids=torch.zeros_like(rows),
            seq_lens=torch.full_like(rows, 5),
            seq_lens_cpu_upper_bound=torch.full_like(rows, 5),
        )
        found = self.sampler(logits, batch)
        return found.sampled_token_ids[:, 0], found.logprobs_tensors


def measure_reported(vocabulary, dtype, temperature, min_p) -> dict[str, Any]:
    """The largest error of a reported log-prob, against float64 of the same logits."""
    torch.manual_seed(vocabulary)
    num, logits = 6, (3 * torch.randn(6, vocabulary)).to(getattr(torch, dtype))
    sampler = V2Sampler(num, vocabulary)
    seeds = [step_seed(3, row) for row in range(num)]
    tokens, reported = sampler(logits.clone(), seeds, [9] * num, temperature, min_p)
    exact = (logits.double() / temperature).log_softmax(-1)
    if min_p:
        kept = exact >= exact.amax(-1, keepdim=True) + torch.tensor(min_p).double().log()
        exact = exact.masked_fill(~kept, float("-inf")).log_softmax(-1)
    error = reported.logprobs[:, 0].double() - exact.gather(1, tokens[:, None])[:, 0]
    return {
        "error": error.abs().max().item(),
        "same_tokens": torch.equal(reported.logprob_token_ids[:, 0], tokens),
        "least_kept": exact.gather(1, tokens[:, None]).min().item(),
    }


def draws(seeds: list[int], positions: list[int]) -> list[int]:
    logits = torch.tensor(PROBABILITIES).log().repeat(len(seeds), 1)
    sampler = V2Sampler(len(seeds), len(PROBABILITIES))
    return sampler(logits, seeds, positions, with_logprobs=False)[0].tolist()


def measure() -> dict[str, Any]:
    seeds = [step_seed(0, 0, row) for row in range(NUM_DRAWS)]
    some = slice(0, 40)
    positions = [17 + row for row in range(NUM_DRAWS)]
    of_seeds = draws(seeds, [17] * NUM_DRAWS)
    return {
        "reported": [measure_reported(*case) for case in REPORTED],
        "of seeds": of_seeds,
        "of positions": draws([seeds[0]] * NUM_DRAWS, positions),
        "of a part": draws(seeds[some][::-1], [17] * 40)[::-1],
        "elsewhere": draws(seeds[some], [18] * 40),
        "of high bits": draws([(row << 40) + 5 for row in range(40)], [17] * 40),
    }


def worker() -> None:
    import triton
    import triton.language as tl

    from tests.support.interpreter import fix_interpreter

    fix_interpreter()
    import vllm.triton_utils as used

    used.triton, used.tl, used.HAS_TRITON = triton, tl, True
    import vllm.v1.worker.gpu.buffer_utils as buffers

    buffers.is_uva_available = lambda: False  # memory that host and GPU both see
    print(json.dumps(measure()))


# --- tests


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return run_worker(Path(__file__), interpret=True)


@pytest.mark.parametrize("case", range(len(REPORTED)), ids=lambda i: str(REPORTED[i]))
def test_the_reported_log_prob_is_that_of_the_distribution_drawn_from(measured, case):
    found = measured["reported"][case]
    assert found["same_tokens"]
    assert found["error"] < 2e-6
    assert found["least_kept"] > -float("inf")


def unlikeliness(tokens: list[int], probabilities: list[float]) -> float:
    """Probability of a chi-square statistic beyond that of `tokens`."""
    expected = torch.tensor(probabilities, dtype=torch.double) * len(tokens)
    found = torch.tensor(tokens).bincount(minlength=len(expected)).double()
    statistic = ((found - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1, dtype=torch.double)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


@pytest.mark.parametrize("of", ["of seeds", "of positions"])
def test_draws_follow_the_distribution(measured, of):
    assert unlikeliness(measured[of], PROBABILITIES) > 1e-3
    uniform = [1 / len(PROBABILITIES)] * len(PROBABILITIES)
    assert unlikeliness(measured[of], uniform) < 1e-6  # which the test would see


@pytest.mark.parametrize("of", ["of seeds", "of positions"])
def test_neighbouring_draws_are_independent(measured, of):
    size, tokens = len(PROBABILITIES), measured[of]
    pairs = [a * size + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
    both = [a * b for a in PROBABILITIES for b in PROBABILITIES]
    assert unlikeliness(pairs, both) > 1e-3


def test_a_token_follows_from_seed_and_position_whatever_else_is_in_the_batch(measured):
    assert measured["of a part"] == measured["of seeds"][:40]
    assert measured["elsewhere"] != measured["of seeds"][:40]


def test_all_bits_of_a_seed_count(measured):
    assert len(set(measured["of high bits"])) > 1


if __name__ == "__main__":
    worker()
