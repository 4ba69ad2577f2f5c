"""Weights to a real vLLM server of two workers, tensor-parallel, in bfloat16, by every way."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time

import pytest
import torch

from rloo_fast.rollout.engine import EngineError, StaleWeights
from rloo_fast.rollout.vllm.http import STALL_S
from rloo_fast.rollout.vllm.server import VLLMServer
from rloo_fast.rollout.vllm.transport import Endpoint
from rloo_fast.weight_sync.unmerged import adapter_shape
from tests.rollout.test_vllm_server import (
    PROMPTS,
    adapted,
    buckets_of,
    generate,
    largest_error,
    move,
    reload,
    sync,
)
from tests.support.serving import KEY, serving, tiny

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
WAYS = ("gloo", "http")
ROUNDING = 0.15  # of log-probs in bfloat16; those of other weights are off by more than 1


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    two = ("--tensor-parallel-size", "2")
    with serving(folder, *two, dtype="bfloat16", executor="mp") as started:
        yield started


def checksums(server) -> dict[str, str]:
    """Of every weight of both workers, by vLLM itself."""
    control = Endpoint(server.url, 5, KEY)
    return control.post("/weight_checker", action="checksum")["checksums"]


def policy(seed: int):
    """The trainer computes in bfloat16, as the server does."""
    return tiny(seed).bfloat16()


def test_by_every_way_the_server_has_the_same_bits(server):
    found = {}
    for way in WAYS:
        engine = VLLMServer(server.url, weight_transfer=way)
        assert engine.sent_dtype == torch.bfloat16
        reload(engine, tiny(1), 1)  # float32: rounded on its way
        found[way] = checksums(server)
        assert largest_error(generate(engine), policy(1), PROMPTS) < ROUNDING
        assert largest_error(generate(engine), policy(2), PROMPTS) > 1
        reload(engine, tiny(2), 2)
        assert checksums(server) != found[way]
        assert largest_error(generate(engine), policy(2), PROMPTS) < ROUNDING
        engine.close()
    assert found["gloo"] == found["http"]
    assert len(found["gloo"]) > 20


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_alone_reaches_both_workers(server, way):
    trained = adapted(policy(1))
    engine = VLLMServer(server.url, weight_transfer=way, adapter=adapter_shape(trained))
    for version in range(3):
        assert sync(engine, trained, version)[0] == ("adapter" if version else "base+adapter")
        assert largest_error(generate(engine), trained, PROMPTS) < 2 * ROUNDING
        move(trained)
    engine.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_left_out_is_named_and_the_next_sync_works(server, way):
    left_out = "model.layers.1.mlp.down_proj.weight"
    engine = VLLMServer(server.url, weight_transfer=way)
    engine.wake(("weights",))
    for _ in range(2):
        with pytest.raises(EngineError, match=left_out):
            engine.load_weights(1, buckets_of(tiny(1), without=left_out))
    with pytest.raises(EngineError, match="no_such_layer"):
        engine.load_weights(1, [[("model.no_such_layer.weight", torch.ones(2))]] * 3)
    engine.load_weights(1, buckets_of(tiny(1)))
    engine.wake(("kv_cache",))
    assert largest_error(generate(engine), policy(1), PROMPTS) < ROUNDING
    engine.close()


def test_the_label_tells_two_trainers_apart_and_each_can_go_on(server, caplog):
    caplog.set_level(logging.INFO)
    first, second = VLLMServer(server.url), VLLMServer(server.url, weight_transfer="http")
    assert "by gloo: trainer and workers are on CPUs" in caplog.text
    reload(first, tiny(1), 1)
    reload(second, tiny(2), 1)
    with pytest.raises(StaleWeights, match="another run"):
        generate(first)
    reload(first, tiny(1), 2)  # its group is made again
    assert largest_error(generate(first), policy(1), PROMPTS) < ROUNDING
    first.close()
    second.close()


def test_nccl_is_refused_where_it_cannot_be(server):
    with pytest.raises(EngineError, match="the trainer computes on cpu"):
        VLLMServer(server.url, weight_transfer="nccl")


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_that_is_killed_in_the_middle_leaves_the_server_for_the_next(server, way):
    command = [sys.executable, "-m", "tests.support.killed_sender", server.url, way]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    start = time.monotonic()
    engine = VLLMServer(server.url, weight_transfer=way)
    reload(engine, tiny(1), 1)
    assert time.monotonic() - start < STALL_S / 4
    assert largest_error(generate(engine), policy(1), PROMPTS) < ROUNDING
    engine.close()


def test_a_server_that_is_killed_in_the_middle_is_told_of(server):  # the last that needs it
    engine, start = VLLMServer(server.url, weight_transfer="gloo"), time.monotonic()

    def buckets():
        first, *rest = buckets_of(tiny(1))
        yield first
        server.kill()
        yield from rest

    engine.wake(("weights",))
    with pytest.raises(EngineError, match=r"is gone .*resume_from_checkpoint"):
        engine.load_weights(1, buckets())
    assert time.monotonic() - start < STALL_S / 4
    engine.close()
