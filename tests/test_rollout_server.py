"""Rollouts by a real vLLM server: it samples from the trainer's weights, or it says why not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import safetensors.torch
import torch
from conftest import make_model, make_tokenizer, require_vllm
from datasets import Dataset
from torch import nn

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.rollout.coverage import poison, uncovered
from rloo_fast.rollout.engine import Bucket, EngineError, StaleWeights, step_seed
from rloo_fast.rollout.transport import BucketServer, Endpoint, Refused
from rloo_fast.rollout.vllm_server import VLLMServer
from rloo_fast.types import Rollout, Sampling

MAX_MODEL_LEN = 128
PROMPTS = [[6 + (3 * i + j) % 26 for j in range(4 + i)] for i in range(6)]
LONG = [[6 + (5 * i + j) % 26 for j in range(70 + i)] for i in range(3)]  # of several cache blocks


# Without a server


def test_coverage_names_what_was_not_written():
    model = make_model(tie_word_embeddings=True)
    poison(model)
    for name, parameter in model.named_parameters():
        if name != "model.norm.weight":
            nn.init.zeros_(parameter)
    assert uncovered(model) == ["model.norm.weight"]


def test_coverage_names_a_tied_weight_once():
    model = make_model(tie_word_embeddings=True)
    poison(model)
    assert [name for name in uncovered(model) if "embed" in name or "head" in name] == [
        "model.embed_tokens.weight"
    ]


def test_one_missing_element_is_enough():
    model = make_model()
    model.lm_head.weight.data[-1, -1] = float("nan")
    assert uncovered(model) == ["lm_head.weight"]


def test_a_bucket_can_be_fetched_only_while_it_is_offered():
    shelf = BucketServer("127.0.0.1")
    matrix = torch.randn(3, 4).T  # as a checkpoint's tensors may be: not contiguous
    with shelf.offer(f"{shelf.new_folder()}/0", [("w", matrix)]) as url:
        fetched = safetensors.torch.load(urlopen(url).read())
        with pytest.raises(HTTPError, match="404"):
            urlopen(url + "1")
    assert torch.equal(fetched["w"], matrix)
    with pytest.raises(HTTPError, match="404"):
        urlopen(url)
    shelf.close()


def test_without_a_server_the_error_says_how_to_start_one():
    with pytest.raises(ConnectionError, match=r"(?s)within 0.1 s.*vllm serve MODEL"):
        VLLMServer(f"http://127.0.0.1:{free_port()}", timeout_s=0.1)


def test_an_address_without_http_is_refused():
    with pytest.raises(ValueError, match="http://localhost:8000"):
        VLLMServer("localhost:8000")


# With one


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def tiny(seed: int):
    """vLLM on a CPU has no heads smaller than 32."""
    return make_model(seed, hidden_size=64, num_attention_heads=2, num_key_value_heads=1).eval()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A vLLM server that has never seen a weight of the policy."""
    require_vllm()
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    tiny(0).config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    command += ["--weight-transfer-config", '{"backend": "rloo_fast"}', "--load-format", "dummy"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN), "--block-size", "32"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "16"]
    command += ["--distributed-executor-backend", "uni"]  # a process less to start
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(url, process, log)
        yield SimpleNamespace(url=url, process=process)
    finally:
        kill(process)


def wait_until_up(url: str, process: subprocess.Popen, log) -> None:
    for _ in range(240):
        try:
            Endpoint(url, 5).get("/health")
            return
        except EngineError:
            assert process.poll() is None, log.read_text()[-4000:]
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def buckets_of(model: nn.Module, without: str = "") -> list[Bucket]:
    named = [(n, p) for n, p in model.state_dict().items() if n != without]
    return [named[:5], named[5:11], named[11:]]


def loaded(url: str, model: nn.Module, version: int = 1) -> VLLMServer:
    engine = VLLMServer(url)
    reload(engine, model, version)
    return engine


def reload(engine: VLLMServer, model: nn.Module, version: int) -> None:
    if engine.version is not None:
        engine.sleep(0)
    engine.wake(("weights",))
    engine.load_weights(version, buckets_of(model))
    engine.wake(("kv_cache",))


def sampling(**changes) -> Sampling:
    fields = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "max_new_tokens": 12,
        "stop_token_ids": (1,),
    }
    return Sampling(**{**fields, **changes})


def seeds_of(prompts: list[list[int]]) -> list[int]:
    return [step_seed(3, sum(ids), len(ids)) for ids in prompts]


def generate(engine: VLLMServer, prompts=PROMPTS, **changes) -> Rollout:
    version = engine.version
    assert version is not None
    return engine.generate(prompts, sampling(**changes), seeds_of(prompts), version=version)


def largest_error(rollout: Rollout, model: nn.Module, prompts, temperature=1.0, top_k=0) -> float:
    """Of the server's log-probs against those of the trainer's model."""
    assert rollout.logps is not None
    worst = 0.0
    for prompt, ids, logps in zip(prompts, rollout.completion_ids, rollout.logps, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logits = logits.float() / temperature
        if top_k:
            kept = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < kept, float("-inf"))
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        worst = max(worst, float((expected - torch.tensor(logps)).abs().max()))
    return worst


@pytest.mark.slow
def test_completions_are_sampled_from_the_weights_sent(server):
    model = tiny(1)
    assert largest_error(generate(loaded(server.url, model)), model, PROMPTS) < 1e-4


@pytest.mark.slow
def test_new_weights_are_seen_also_behind_the_prefix_cache(server):
    old, new = tiny(1), tiny(2)
    engine = loaded(server.url, old, 1)
    assert largest_error(generate(engine, LONG), old, LONG) < 1e-4
    reload(engine, new, 2)
    assert largest_error(generate(engine, LONG), new, LONG) < 1e-4


@pytest.mark.slow
def test_logps_are_of_the_distribution_drawn_from(server):
    model = tiny(1)
    rollout = generate(loaded(server.url, model), temperature=0.7, top_k=5)
    assert largest_error(rollout, model, PROMPTS, temperature=0.7, top_k=5) < 1e-4


@pytest.mark.slow
def test_a_weight_left_out_is_named_and_the_next_load_works(server):
    model, left_out = tiny(1), "model.layers.1.mlp.down_proj.weight"
    engine = VLLMServer(server.url)
    engine.wake(("weights",))
    with pytest.raises(EngineError, match=left_out):
        engine.load_weights(1, buckets_of(model, without=left_out))
    engine.load_weights(1, buckets_of(model))
    engine.wake(("kv_cache",))
    assert largest_error(generate(engine), model, PROMPTS) < 1e-4


@pytest.mark.slow
def test_weights_of_another_run_are_stale_even_under_the_same_version(server):
    engine = loaded(server.url, tiny(1))
    loaded(server.url, tiny(2))
    with pytest.raises(StaleWeights, match="another run"):
        generate(engine)


@pytest.mark.slow
def test_weights_that_change_during_a_rollout_are_noticed(server):
    engine, finished = loaded(server.url, tiny(1)), []

    def on_finished(index: int, ids: list[int]) -> None:
        finished.append(index)
        loaded(server.url, tiny(2))

    with pytest.raises(StaleWeights, match="another run"):
        engine.generate([[6, 7]], sampling(), [5], version=1, on_finished=on_finished)
    assert finished == [0]


@pytest.mark.slow
def test_two_runs_cannot_mix_their_weights(server):
    model = tiny(1)
    foreign = BucketServer("127.0.0.1")

    def interrupted():
        first, *rest = buckets_of(model)
        yield first
        with (
            foreign.offer(f"{foreign.new_folder()}/0", buckets_of(tiny(2))[0]) as url,
            pytest.raises(Refused, match="two trainers"),
        ):
            Endpoint(server.url, 5).post("/update_weights", update_info={"url": url})
        yield from rest

    engine = VLLMServer(server.url)
    engine.wake(("weights",))
    with pytest.raises(EngineError, match="start_weight_update must be called"):
        engine.load_weights(1, interrupted())


@pytest.mark.slow
def test_a_completion_follows_from_its_prompt_and_seed_alone(server):
    engine = loaded(server.url, tiny(1))
    prompts = [PROMPTS[0]] * 4 + PROMPTS  # the same prompt under other seeds, too
    seeds = [step_seed(0, i) for i in range(len(prompts))]
    forward = engine.generate(prompts, sampling(), seeds, version=1).completion_ids
    backward = engine.generate(prompts[::-1], sampling(), seeds[::-1], version=1).completion_ids
    assert backward[::-1] == forward
    assert len(set(map(tuple, forward[:4]))) > 1


@pytest.mark.slow
def test_exactly_our_stop_tokens_end_a_completion_and_are_part_of_it(server):
    stops = (9, 13, 21)
    rollout = generate(
        loaded(server.url, tiny(1)), PROMPTS * 4, stop_token_ids=stops, temperature=1.5
    )
    for ids, reason in zip(rollout.completion_ids, rollout.finish_reasons, strict=True):
        assert not set(stops) & set(ids[:-1])
        assert (reason, len(ids)) == ("length", 12) if ids[-1] not in stops else reason == "stop"
    assert {*rollout.finish_reasons} == {"stop", "length"}
    assert any(1 in ids[:-1] for ids in rollout.completion_ids)  # <eos> is not among the three


@pytest.mark.slow
def test_each_completion_is_announced_once(server):
    engine, seen = loaded(server.url, tiny(1)), {}
    rollout = engine.generate(
        PROMPTS, sampling(), seeds_of(PROMPTS), version=1, on_finished=seen.__setitem__
    )
    assert [seen[i] for i in range(len(PROMPTS))] == rollout.completion_ids


@pytest.mark.slow
def test_further_settings_reach_the_server(server):
    rollout = generate(loaded(server.url, tiny(1)), extra={"allowed_token_ids": [7, 8]})
    assert set().union(*rollout.completion_ids) <= {7, 8}


@pytest.mark.slow
def test_settings_that_the_server_would_ignore_are_refused(server):
    engine = loaded(server.url, tiny(1))
    with pytest.raises(ValueError, match="num_beams"):
        generate(engine, extra={"num_beams": 2})


@pytest.mark.slow
def test_what_the_server_refuses_is_passed_on(server):
    engine = loaded(server.url, tiny(1))
    with pytest.raises(EngineError, match=r"top_p must be in \(0, 1\]"):
        generate(engine, top_p=-1.0)


@pytest.mark.slow
def test_a_prompt_too_long_names_the_settings(server):
    engine = loaded(server.url, tiny(1))
    with pytest.raises(ValueError, match=r"--max-model-len 132, or lower max_completion_length"):
        generate(engine, [[6] * 120])


@pytest.mark.slow
def test_the_other_processes_wait_for_the_main_one_and_ask_for_themselves(server):
    model, both, gathered = tiny(1), threading.Barrier(2, timeout=60), []

    def barrier() -> None:
        both.wait()

    def process(is_main: bool) -> Rollout:
        engine = VLLMServer(server.url, is_main=is_main, barrier=barrier)
        engine.wake(("weights",))
        buckets = buckets_of(model)
        engine.load_weights(4, (gathered.append(is_main) or b for b in buckets))
        engine.wake(("kv_cache",))
        return generate(engine, PROMPTS[:2] if is_main else PROMPTS[2:4])

    with ThreadPoolExecutor(2) as pool:
        main, other = pool.map(process, (True, False))
    assert largest_error(main, model, PROMPTS[:2]) < 1e-4
    assert largest_error(other, model, PROMPTS[2:4]) < 1e-4
    assert sorted(gathered) == [False] * 3 + [True] * 3  # gathering is everybody's work


@pytest.mark.slow
def test_a_run_samples_from_its_policy_in_every_step(server, tmp_path):
    args = RLOOConfig(
        str(tmp_path), use_vllm=True, vllm_mode="server", vllm_server_base_url=server.url,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=8, max_steps=5,
        learning_rate=0.02, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = RLOOTrainer(
        tiny(1),
        lambda completion_ids, **_: [float(ids.count(9)) for ids in completion_ids],
        args,
        Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5"] * 4}),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    steps = [row for row in trainer.state.log_history if "sampling/logp_diff_max" in row]
    assert len(steps) == 5
    assert max(row["sampling/logp_diff_max"] for row in steps) < 1e-4
    assert steps[-1]["reward"] > steps[0]["reward"] + 0.5
    trainer.rollouts.close()


@pytest.mark.slow
def test_a_server_that_dies_is_named_with_what_to_do(server):  # the last test that needs it
    engine = loaded(server.url, tiny(1))
    killed = []

    def on_finished(index: int, ids: list[int]) -> None:
        if not killed:
            killed.append(index)
            kill(server.process)

    long = sampling(max_new_tokens=MAX_MODEL_LEN - 2, stop_token_ids=())
    with pytest.raises(EngineError, match=r"is gone .*resume_from_checkpoint"):
        engine.generate([[6, 7]] * 64, long, range(64), version=1, on_finished=on_finished)
    assert killed
