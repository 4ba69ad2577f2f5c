"""The peers of `benchmarks.loss`: their calls against their sources, and what they are gated by."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.loss import batches, peers, providers
from benchmarks.loss import run as loss
from benchmarks.loss.providers import LINEAR, Provider
from benchmarks.loss.run import JOBS, Job, Shape
from tests.support.peer_source import module_path, signature

CPU = torch.device("cpu")


class PeerCall(NamedTuple):
    """One call in `benchmarks.loss` of a name imported from a peer."""

    function: str
    module: str
    name: str
    num_positional: int
    keywords: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.function}-{self.name}"


def peer_calls(module) -> Iterator[PeerCall]:
    for function in ast.parse(Path(inspect.getfile(module)).read_text()).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        imported = {
            alias.name: node.module
            for node in ast.walk(function)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).removesuffix(".apply")
                if name in imported and not imported[name].startswith("rloo_kernels"):
                    keywords = tuple(x.arg for x in node.keywords if x.arg is not None)
                    yield PeerCall(function.name, imported[name], name, len(node.args), keywords)


CALLS = [*peer_calls(peers), *peer_calls(providers)]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_peer_takes_the_call_that_is_made_of_it(call):
    taken = signature(call.module, call.name)
    taken.bind(*[None] * call.num_positional, **dict.fromkeys(call.keywords))


def test_no_peer_is_left_out_of_that():
    called = {call.function: call.module.split(".")[0] for call in CALLS}
    for function in (
        "trl", "verl", "liger", "liger_sm90", "liger_cutile", "_cce", "quack", "quack_fused",
    ):  # fmt: skip
        assert function in called
    assert called["quack_fused"] == "quack"


def test_cce_takes_the_option_that_is_passed_on():
    assert "filter_eps" in signature("cut_cross_entropy", "linear_cross_entropy").parameters


def test_quacks_fused_op_takes_no_coefficients_per_token():
    """Else its row is to be run on the job itself."""
    source = ast.parse(module_path("quack.linear_cross_entropy").read_text())
    (function,) = [
        x
        for x in source.body
        if isinstance(x, ast.FunctionDef) and x.name == "chunked_linear_cross_entropy"
    ]
    conditions = [ast.unparse(x.test) for x in function.body if isinstance(x, ast.If)]
    assert "reduction not in ['mean', 'sum']" in conditions


def run_with(planted: dict[str, Provider]) -> dict[str, str | None]:
    job = JOBS["linear"]
    job = Job(job.name, {"eager": LINEAR["eager"], **planted}, job.reference, job.gradients)
    options = {"runs": 1, "warmup": 0, "measure_memory": False}
    shape = Shape("custom", 256, 32, 512)
    rows = loss.run_job(job, shape, torch.float32, CPU, list(planted), **options)
    return {row.provider: row.skipped for row in rows}


def test_torchs_chunked_op_gives_the_rloo_loss():
    assert run_with({"torch": LINEAR["torch"]}) == {"torch": None}


def test_an_op_with_another_objective_is_gated_by_that_one():
    sum_of = partial(providers.eager, objective=peers.nll_sum)
    found = run_with(
        {
            "right": Provider(sum_of, objective=peers.nll_sum),
            "wrong": Provider(lambda b: 1.001 * sum_of(b), objective=peers.nll_sum),
            "not RLOO": Provider(sum_of),
        }
    )
    assert found["right"] is None
    assert str(found["wrong"]).startswith("wrong: error of ")
    assert str(found["not RLOO"]).startswith("wrong: error of ")


def test_float64_reference_of_another_objective():
    batch = batches.linear_batch(256, 16, 300, torch.float64, CPU)
    hidden, weight = batch.leaves
    logps = (hidden @ weight.T).log_softmax(-1).gather(1, batch.token_ids[:, None]).squeeze(1)
    value = peers.nll_sum(logps, batch)
    grads = torch.autograd.grad(value, batch.leaves)
    outputs = {"loss": value, "grad_hidden": grads[0], "grad_weight": grads[1]}
    errors = batches.linear_reference(batch, peers.nll_sum).errors(outputs)
    assert max(errors.values()) < 1e-7


@pytest.mark.parametrize("name", ["liger_sm90", "liger_cutile", "verl", "quack", "quack_fused"])
def test_a_peer_of_gpus_says_why_it_does_not_run_on_a_cpu(name):
    assert LINEAR[name].available(CPU) == "its kernels need a GPU, not cpu"


def test_a_missing_parent_package_is_a_reason_not_an_error():
    assert providers.needs("no_such_package.tile")(CPU) == "no_such_package.tile is not installed"
