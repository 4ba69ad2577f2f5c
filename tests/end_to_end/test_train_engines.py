"""Two gloo processes equal one, with every training engine: weights, loss, gradient norm, metrics.

`python -m tests.end_to_end.test_train_engines` prints the table: engine, case ->
largest differences.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from rloo_fast.reports.metric_names import is_timing
from tests.support.cpu_engines import ENGINES, require_deepspeed
from tests.support.launch import run_worker_processes
from tests.support.tiny import make_model

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
MAIN = ("ddp", "fsdp2", "zero2", "zero3")
SPLITS_WEIGHTS = ("fsdp2", "zero3")
# `batch`: rows of each of two processes; one process has twice as many. Steps are of several
# micro-batches, and with these gradients some are clipped.
WHOLE = {"num_generations": 2, "batch": 4, "max_tokens_per_micro_batch": 30, "beta": 0.1}
SPLIT = {**WHOLE, "num_generations": 8, "batch": 2, "gradient_accumulation_steps": 2}
PADDED_TOO = ((False, 0.1, "whole"), (True, 0.0, "split"))
# engine, adapters, beta, groups: all values of any three occur together
HALVES = (("ddp", "zero3"), ("fsdp2", "zero2"))
MATRIX = {
    f"{'LoRA' if lora else 'full'}, beta {beta}, {kind} groups, {layout}": (
        MAIN if layout == "padded" else HALVES[(lora + (beta > 0) + (kind == "split")) % 2],
        {**groups, "lora": lora, "beta": beta, "layout": layout, "evaluate": False},
    )
    for lora, beta, (kind, groups), layout in itertools.product(
        (False, True), (0.0, 0.1), (("whole", WHOLE), ("split", SPLIT)), ("shared_prefix", "padded")
    )
    # a layout makes tensors, not collectives: padded with two of the eight others will do
    if layout == "shared_prefix" or (lora, beta, kind) in PADDED_TOO
}
ONE_RANK_HAS_ROWS = "beta 0, rows with signal on one rank"
ADAMW = "AdamW, everything moved out of the way of every rollout"
SAMPLED = ("sampled by the policy", "sampled by the policy, LoRA")
MORE: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "ZeRO-1": (("zero1",), WHOLE),
    "ZeRO-1, LoRA": (("zero1",), {**SPLIT, "lora": True}),
    # no biases, which start at 0: all of one would be its change, which Adam makes as large as any
    # and what can move is on the host while completions are sampled
    ADAMW: (ENGINES, {**WHOLE, "optim": "adamw_torch", "model": "llama", "room": True}),
    "gradient checkpointing": (SPLITS_WEIGHTS, {**WHOLE, "gradient_checkpointing": True}),
    "gradient checkpointing, LoRA": (
        SPLITS_WEIGHTS, {**SPLIT, "gradient_checkpointing": True, "lora": True},
    ),
    "four groups per rank, of unequal lengths": (
        ("ddp", "zero2"), {**WHOLE, "batch": 8, "max_tokens_per_micro_batch": 25},
    ),
    "groups that share a system prompt and an example": (
        ("ddp", "fsdp2", "zero3"),
        {**WHOLE, "batch": 8, "max_tokens_per_micro_batch": 60, "system": True},
    ),
    ONE_RANK_HAS_ROWS: (ENGINES, {**WHOLE, "beta": 0.0, "reward": "only_long_prompts"}),
    "normalized, num_iterations 2, token-level KL": (
        SPLITS_WEIGHTS,
        {"num_generations": 4, "batch": 4, "normalize_advantages": True, "num_iterations": 2,
         "token_level_kl": True},
    ),
    # what a sum over tokens is divided by is of both ranks, whose rows are of unequal lengths
    "DAPO, two steps per rollout": (
        ("ddp",), {**SPLIT, "loss": "dapo", "advantage": "grpo", "num_iterations": 2},
    ),
    "importance weights per token, two steps per rollout": (
        ("ddp", "zero3"),
        {**WHOLE, "max_tokens_per_micro_batch": 25, "truncated_importance_sampling": "token",
         "importance_sampling_cap": 1.2, "num_iterations": 2},
    ),
    "importance weights per sequence": (
        ("ddp", "fsdp2"),
        {"num_generations": 4, "batch": 4, "truncated_importance_sampling": "sequence",
         "importance_sampling_cap": 1.2},
    ),
    "rows of older weights, two steps per rollout": (
        ("ddp", "zero3"), {**WHOLE, "stale": True, "num_iterations": 2},
    ),
    "out of memory on one rank": (
        ("ddp",), {**WHOLE, "batch": 8, "max_tokens_per_micro_batch": 24, "out_of_memory": True},
    ),
    "moving reference": (
        ("ddp", *SPLITS_WEIGHTS), {**WHOLE, "sync_ref_model": True, "ref_model_sync_steps": 1},
    ),
    "tied embeddings": (SPLITS_WEIGHTS, {**WHOLE, "model": "tied"}),
    "GPT-NeoX": (SPLITS_WEIGHTS, {**WHOLE, "model": "gpt_neox"}),
    "Llama": (SPLITS_WEIGHTS, {**SPLIT, "model": "llama"}),
    "adapters passed in": (SPLITS_WEIGHTS, {**WHOLE, "lora": "passed in"}),
    # a prompt each, one of a single token: generate() is called once there, twice on the other
    SAMPLED[0]: (SPLITS_WEIGHTS, {**WHOLE, "sample": True, "batch": 2}),
    SAMPLED[1]: (SPLITS_WEIGHTS, {**SPLIT, "sample": True, "lora": True}),
    "bf16": (("fsdp2", "zero2", "zero3"), {**WHOLE, "bf16": True, "model": "rounded"}),
    "bf16, LoRA": (
        SPLITS_WEIGHTS, {**SPLIT, "bf16": True, "model": "rounded", "lora": "passed in"},
    ),
}  # fmt: skip
CASES = MATRIX | MORE
PAIRS = [(case, engine) for case, (engines, _) in CASES.items() for engine in engines]
# Largest differences from one process that are let pass. Those of the weights are relative to the
# weight, or to its change over the run; that of the gradient norm is relative too.
BOUNDS = {
    "float32": {"weights": 1e-5, "change": 2e-4, "loss": 1e-6, "grad_norm": 1e-5},
    # measured: 2e-3, 0.05, 3e-8, 0.03; one process' autocast does not round what engines round
    "bf16": {"weights": 5e-3, "change": 0.1, "loss": 1e-6, "grad_norm": 0.05},
}
# the 2024 trainer's are means over micro-batches; the others count what was run
OF_THE_MICRO_BATCHES = {"val/ratio", "val/ratio_var", "update/tokens_run", "update/micro_batches"}


def save_models(out: Path) -> None:
    make_model().save_pretrained(out / "qwen2")
    make_model(tie_word_embeddings=True).save_pretrained(out / "tied")
    sizes: dict[str, Any] = dict(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**sizes))
    llama.save_pretrained(out / "llama")
    llama.bfloat16().float().save_pretrained(out / "rounded")  # as DeepSpeed in bf16 would
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).save_pretrained(out / "gpt_neox")


def launch(out: Path, models: Path, processes: int, cases: list[dict[str, Any]]) -> list[Any]:
    """What engine_worker.py saved of every case."""
    out.mkdir()
    settings = []
    for case in cases:
        fields = dict(case)
        fields["per_device_train_batch_size"] = fields.pop("batch") * 2 // processes
        settings.append({**fields, "per_device_eval_batch_size": 8 // processes})
    given = [str(out), str(models), json.dumps(settings)]
    done = run_worker_processes("engine_worker", *given, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"{i}.pt") for i in range(len(cases))]


def run_all(tmp: Path) -> dict[tuple[str, str], tuple[Any, Any]]:
    """(case, engine) -> what one process saved, and two."""
    save_models(tmp / "models")
    ones = launch(tmp / "one", tmp / "models", 1, [settings for _, settings in CASES.values()])
    one = dict(zip(CASES, ones, strict=True))
    settings = [{**CASES[case][1], "engine": engine} for case, engine in PAIRS]
    twos = launch(tmp / "two", tmp / "models", 2, settings)
    return {pair: (one[pair[0]], two) for pair, two in zip(PAIRS, twos, strict=True)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    require_deepspeed()
    return run_all(tmp_path_factory.mktemp("engines"))


def steps(run: dict[str, Any]) -> list[dict[str, float]]:
    return [row for row in run["logs"] if "loss" in row]


def differences(one: dict[str, Any], two: dict[str, Any]) -> dict[str, float]:
    """The largest over weights and steps; names and units as in BOUNDS."""
    found = {"weights": 0.0, "change": 0.0}
    for name, weight in one["weights"].items():
        off = (two["weights"][name].double() - weight.double()).norm()
        change = (weight.double() - one["start"][name].double()).norm()
        found["weights"] = max(found["weights"], float(off / weight.double().norm()))
        if off or change:
            found["change"] = max(found["change"], float(off / change))
    pairs = list(zip(steps(one), steps(two), strict=True))
    found["loss"] = max(abs(b["loss"] - a["loss"]) for a, b in pairs)
    found["grad_norm"] = max(abs(b["grad_norm"] / a["grad_norm"] - 1) for a, b in pairs)
    return found


def precision(case: str) -> str:
    return "bf16" if CASES[case][1].get("bf16") else "float32"


@pytest.mark.parametrize(("case", "engine"), PAIRS)
def test_two_processes_train_what_one_does(case, engine, runs):
    one, two = runs[case, engine]
    assert two["weights"].keys() == one["weights"].keys()
    found, bounds = differences(one, two), BOUNDS[precision(case)]
    assert all(found[name] <= bounds[name] for name in bounds), (found, bounds)


@pytest.mark.parametrize(("case", "engine"), [p for p in PAIRS if precision(p[0]) == "float32"])
def test_two_processes_log_what_one_does(case, engine, runs):
    for a, b in zip(*(run["logs"] for run in runs[case, engine]), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - OF_THE_MICRO_BATCHES:
            if not is_timing(key):
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("engine", CASES["moving reference"][0])
def test_the_reference_moves_as_in_one_process(engine, runs):
    one, two = runs["moving reference", engine]
    for name, weight in one["reference"].items():
        assert (weight != one["start"][name]).any(), name
        assert (two["reference"][name] - weight).norm() <= 1e-5 * weight.norm(), name


@pytest.mark.parametrize("engine", SPLITS_WEIGHTS)
@pytest.mark.parametrize("case", SAMPLED)
def test_two_processes_sample_what_one_does(case, engine, runs):
    one, two = (sampled(run) for run in runs[case, engine])
    assert len({tuple(ids) for step in one for ids in step}) > len(one)  # not one for all
    assert two == one


def sampled(run: dict[str, Any]) -> list[list[list[int]]]:
    """Per generation batch, the completions of all ranks."""
    per_rank = [rank["completions"] for rank in run["ranks"]]
    return [list(itertools.chain(*parts)) for parts in zip(*per_rank, strict=True)]


def test_ranks_hold_unequal_numbers_of_tokens(runs):
    for pair, (_, two) in runs.items():
        first, second = (rank["tokens"] for rank in two["ranks"])
        assert first != second, pair


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_without_rows_to_run_does_not_hold_up_the_other(engine, runs):
    _, two = runs[ONE_RANK_HAS_ROWS, engine]
    rows_run = list(zip(*(rank["rows_run"] for rank in two["ranks"]), strict=True))
    assert [sorted(step) for step in rows_run[:2]] == [[0, 2], [0, 2]]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_memory_plan_counts_is_what_is_there(engine, runs):
    memory = runs[ADAMW, engine][1]["memory"]
    assert memory["measured"] == pytest.approx(memory["live"], rel=0.05)


@pytest.mark.parametrize("engine", ENGINES)
def test_deepspeed_moves_what_it_can_by_itself(engine, runs):
    by_itself = {
        "zero1": ["hp_params", "optim_states"],
        "zero2": ["hp_params", "optim_states"],
        "zero3": ["contiguous_grad_buffer", "lp_grads"],  # the rest for its FusedAdam alone
    }
    for moved, by_engine in runs[ADAMW, engine][1]["memory"]["moved"][1:]:
        assert moved == ("gradients", "optimizer", "reference")
        assert by_engine == by_itself.get(engine, [])


def print_table() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = run_all(Path(folder))
    names = list(BOUNDS["float32"])
    print(f"{'engine':6}  {'case':51}", *(f"{name:>9}" for name in names))
    for (case, engine), (one, two) in sorted(runs.items(), key=lambda item: item[0][1]):
        found = differences(one, two)
        print(f"{engine:6}  {case:51}", *(f"{found[name]:9.1e}" for name in names))


if __name__ == "__main__":
    print_table()
