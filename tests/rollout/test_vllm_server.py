"""Rollouts by a real vLLM server: it samples from the trainer's weights, or it says why not."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import safetensors.torch
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.data.seeds import step_seed
from rloo_fast.records import Bucket, Rollout, Sampling
from rloo_fast.rollout.engine import EngineError, StaleWeights
from rloo_fast.rollout.stops import Stops
from rloo_fast.rollout.vllm.http import NOT_FETCHED
from rloo_fast.rollout.vllm.offers import BucketServer
from rloo_fast.rollout.vllm.pack import pack
from rloo_fast.rollout.vllm.server import VLLMServer
from rloo_fast.rollout.vllm.servers import VLLMServers
from rloo_fast.rollout.vllm.transport import Endpoint, Refused
from rloo_fast.weight_sync.coverage import poison, uncovered
from rloo_fast.weight_sync.unmerged import AdapterShape, adapter_shape, policy_buckets
from tests.support.launch import free_port
from tests.support.offered import offered
from tests.support.serving import KEY, MAX_MODEL_LEN, serving, tiny
from tests.support.tiny import make_model, make_tokenizer

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
    with offered(shelf, pack([("w", matrix)])) as url:
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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A vLLM server with a key that has never seen a weight of the policy."""
    with serving(tmp_path_factory.mktemp("server")) as started:
        yield started


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


def adapted(model: nn.Module):
    """With LoRA on all its linear layers, away from its start."""
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", rank_pattern={"q_proj": 6})
    policy = get_peft_model(model, config).eval()
    move(policy)
    return policy


def move(policy) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def sync(engine: VLLMServer, policy, version: int) -> tuple[str, int]:
    """What the engine wanted, and the bytes it was sent."""
    if engine.version is not None:
        engine.sleep(0)
    engine.wake(("weights",))
    wanted, sent = engine.wanted, 0

    def counted():
        nonlocal sent
        for bucket in policy_buckets(policy, 20_000, torch.float32, wanted):
            sent += sum(tensor.nbytes for _, tensor in bucket)
            yield bucket

    engine.load_weights(version, counted())
    engine.wake(("kv_cache",))
    return wanted, sent


@pytest.mark.slow
@pytest.mark.vllm
def test_after_the_first_sync_an_adapter_is_sent_alone(server):
    policy = adapted(tiny(1))
    engine = VLLMServer(server.url, adapter=adapter_shape(policy))
    numbers = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    for version in range(3):
        wanted, sent = sync(engine, policy, version)
        assert wanted == ("adapter" if version else "base+adapter")
        assert not version or sent == 4 * numbers
        assert largest_error(generate(engine, PROMPTS + LONG), policy, PROMPTS + LONG) < 1e-4
        move(policy)
    # another run brings its own weights: the first one's adapter must not be put on them
    other = loaded(server.url, tiny(2))
    assert largest_error(generate(other), tiny(2), PROMPTS) < 1e-4
    engine.sleep(0)
    engine.wake(("weights",))
    with pytest.raises(StaleWeights):
        engine.load_weights(3, policy_buckets(policy, 20_000, torch.float32, engine.wanted))
    engine = VLLMServer(server.url, adapter=adapter_shape(policy))
    assert sync(engine, policy, 4)[0] == "base+adapter"
    assert largest_error(generate(engine), policy, PROMPTS) < 1e-4


@pytest.mark.slow
@pytest.mark.vllm
def test_an_adapter_that_the_server_cannot_hold_is_refused(server):
    policy = adapted(tiny(1))
    rank, names = adapter_shape(policy)
    with pytest.raises(EngineError, match=r"(?s)max_lora_rank is 8.*--max-lora-rank 16"):
        VLLMServer(server.url, adapter=AdapterShape(12, names))
    engine = VLLMServer(server.url, adapter=AdapterShape(rank, names))
    sync(engine, policy, 0)
    (tensors,) = policy_buckets(policy, 1 << 30, torch.float32, "adapter")
    name, a = tensors[0]
    elsewhere = [(n.replace("layers.1", "layers.7"), tensor) for n, tensor in tensors]
    wider = [(n, torch.cat([t] * 3, int("lora_B" in n))) for n, t in tensors]
    for said, parts, tensors_sent in (
        ("holds NaN", "adapter", [(name, a * float("nan")), *tensors[1:]]),
        ("vLLM has no layer with LoRA for 7 of the 14", "adapter", elsewhere),
        ("rank 18, and vLLM was started with max_lora_rank 8", "adapter", wider),
        ("nothing was sent", "adapter", []),
        ("model.norm.weight was sent", "adapter", [("model.norm.weight", torch.ones(64))]),
        ("an adapter was sent in an update of merged weights", "merged", tensors),
        ("without the weights that it belongs to", "adapter", tensors),  # the last one broke them
        ("not 'other'", "other", tensors),
    ):
        assert said in refusal(server.url, parts, tensors_sent)


def refusal(url: str, parts: str, tensors: Bucket) -> str:
    """What the server says to an update of these."""
    control, shelf = Endpoint(url, 5, KEY), BucketServer("127.0.0.1")
    with suppress(Refused):  # one that failed at its end is still open
        control.post("/update_weights", update_info={"url": ""})
    control.post("/start_weight_update")
    try:
        if tensors:
            with offered(shelf, pack(tensors)) as offer:
                control.post("/update_weights", update_info={"url": offer, "parts": parts})
        control.post("/finish_weight_update", weight_version="refused")
    except Refused as error:
        return str(error)
    finally:
        shelf.close()
    return "taken"


@pytest.mark.slow
@pytest.mark.vllm
def test_without_the_key_no_endpoint_of_the_server_does_anything(server):
    engine = loaded(server.url, tiny(1))
    schema = Endpoint(server.url, 5, KEY).get("/openapi.json")
    routes = [(p, m) for p, methods in schema["paths"].items() for m in methods]
    assert ("/update_weights", "post") in routes
    assert ("/collective_rpc", "post") in routes
    with ThreadPoolExecutor(8) as pool:
        statuses = pool.map(lambda route: status_of(server.url, *route, {}), routes)
    answered = {route for route, status in zip(routes, statuses, strict=True) if status != 401}
    assert answered <= {(p, "get") for p in ("/health", "/ping", "/version", "/metrics")}
    wrong = {"Authorization": "Bearer wrong"}
    assert status_of(server.url, "/update_weights", "post", wrong) == 401
    for path in ("/update_weights/", "//update_weights", "/health/../sleep", "/%75pdate_weights"):
        assert status_of(server.url, path, "post", {}) == 401
    assert largest_error(generate(engine), tiny(1), PROMPTS) < 1e-4


def status_of(url: str, path: str, method: str, headers: dict[str, str]) -> int:
    request = Request(url + path, b"{}", headers, method=method.upper())
    try:
        with urlopen(request, timeout=20) as response:
            return response.status
    except HTTPError as error:
        return error.code


@pytest.mark.slow
@pytest.mark.vllm
def test_a_trainer_without_the_key_or_with_another_is_told_so(server, monkeypatch):
    for key, said in (("", "VLLM_API_KEY is not set"), ("wrong", "the one in VLLM_API_KEY is not")):
        monkeypatch.setenv("VLLM_API_KEY", key)
        with pytest.raises(EngineError, match=said) as caught:
            VLLMServer(server.url)
        assert "wrong" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.vllm
def test_whatever_is_wrong_with_a_url_the_server_says_the_same_and_asks_nobody(server):
    control, shelf = Endpoint(server.url, 5, KEY), BucketServer("127.0.0.1")
    internal = socket.create_server(("127.0.0.1", 0))
    port, token, said = internal.getsockname()[1], "t" * 43, set()
    urls = [
        "file:///etc/passwd", "file:///etc/none", "file:///dev/zero", "http://127.0.0.1:1/x",
        f"http://127.0.0.1:{port}/admin", f"http://localhost:{port}/{token}/0",
        f"http://u@127.0.0.1:{port}/{token}/0", f"http://2130706433:{port}/{token}/0",
        f"http://8.8.8.8:{port}/{token}/0", f"http://127.0.0.1:{free_port()}/{token}/0",
        f"http://127.0.0.1:{server.url.rpartition(':')[2]}/{token}/0", 5, None, [], {},
    ]  # fmt: skip
    with offered(shelf, pack([("w", torch.ones(3))])) as url:
        for each in [*urls, url + "1"]:
            control.post("/start_weight_update")
            with pytest.raises(Refused, match=NOT_FETCHED) as caught:
                control.post("/update_weights", update_info={"url": each})
            said.add((caught.value.status, str(caught.value)))
    assert len(said) == 1
    internal.setblocking(False)
    with pytest.raises(BlockingIOError):
        internal.accept()
    internal.close()
    assert "is another machine's: name it in RLOO_FAST_TRAINER_HOST" in server.log.read_text()
    assert largest_error(generate(loaded(server.url, tiny(1))), tiny(1), PROMPTS) < 1e-4


@pytest.mark.slow
@pytest.mark.vllm
def test_an_address_that_the_server_may_not_open_is_named_to_the_user(server, monkeypatch):
    address = f"http://8.8.8.8:4444/{'t' * 43}/0"
    monkeypatch.setattr(BucketServer, "meeting", lambda *_: nullcontext((address, None)))
    with pytest.raises(EngineError, match=r"start it with RLOO_FAST_TRAINER_HOST=127\.0\.0\.1"):
        VLLMServer(server.url)


@pytest.mark.slow
@pytest.mark.vllm
def test_more_bytes_than_the_model_has_are_not_read(server):
    """16 MiB beside 4 bytes per parameter: in one bucket, and in all of an update together."""
    control, shelf, model = Endpoint(server.url, 5, KEY), BucketServer("127.0.0.1"), tiny(1)
    most = 16 * 2**20 + 4 * sum(p.numel() for p in model.parameters())
    padding = 2**20  # of the server's vocabulary
    control.post("/start_weight_update")
    too_much = [("w", torch.ones((most + padding) // 4))]
    with (
        offered(shelf, pack(too_much)) as url,
        pytest.raises(Refused, match=NOT_FETCHED),
    ):
        control.post("/update_weights", update_info={"url": url})
    weights = list(model.state_dict().items())
    control.post("/start_weight_update")
    with offered(shelf, pack(weights)) as url:
        with urlopen(url) as response:
            size, taken = len(response.read()), 0
        with suppress(Refused):
            while taken <= most + padding:
                control.post("/update_weights", update_info={"url": url})
                taken += size
    assert most - size < taken <= most + padding
    shelf.close()


@pytest.mark.slow
@pytest.mark.vllm
def test_answers_have_all_that_is_checked(server):
    """The fields by which answers are told apart are vLLM's, and so are their limits."""
    engine, seen = loaded(server.url, tiny(1)), []
    engine._vocab_size = tiny(1).config.vocab_size
    ask = Endpoint.ask

    def spy(self, path, fields, **limits):
        answer = ask(self, path, fields, **limits)
        seen.append((fields, answer))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Endpoint, "ask", spy)
        generate(engine)
        for fields, answer in seen:
            assert answer["id"] == f"cmpl-{fields['request_id']}"
            assert answer["choices"][0]["prompt_token_ids"] == fields["prompt"]
        assert len(seen) == len(PROMPTS)
        swapped = [answer for _, answer in seen]
        patch.setattr(Endpoint, "ask", lambda *_, **__: swapped.pop())
        with pytest.raises(EngineError, match="it is for request"):
            generate(engine)


@pytest.mark.slow
@pytest.mark.vllm
def test_completions_are_sampled_from_the_weights_sent(server):
    model = tiny(1)
    assert largest_error(generate(loaded(server.url, model)), model, PROMPTS) < 1e-4


@pytest.mark.slow
@pytest.mark.vllm
def test_new_weights_are_seen_also_behind_the_prefix_cache(server):
    old, new = tiny(1), tiny(2)
    engine = loaded(server.url, old, 1)
    assert largest_error(generate(engine, LONG), old, LONG) < 1e-4
    reload(engine, new, 2)
    assert largest_error(generate(engine, LONG), new, LONG) < 1e-4


@pytest.mark.slow
@pytest.mark.vllm
def test_logps_are_of_the_distribution_drawn_from(server):
    model = tiny(1)
    rollout = generate(loaded(server.url, model), temperature=0.7, top_k=5)
    assert largest_error(rollout, model, PROMPTS, temperature=0.7, top_k=5) < 1e-4


@pytest.mark.slow
@pytest.mark.vllm
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
@pytest.mark.vllm
def test_weights_of_another_run_are_stale_even_under_the_same_version(server):
    engine = loaded(server.url, tiny(1))
    loaded(server.url, tiny(2))
    with pytest.raises(StaleWeights, match="another run"):
        generate(engine)


@pytest.mark.slow
@pytest.mark.vllm
def test_weights_that_change_during_a_rollout_are_noticed(server):
    engine, finished = loaded(server.url, tiny(1)), []

    def on_finished(index: int, ids: list[int]) -> None:
        finished.append(index)
        loaded(server.url, tiny(2))

    with pytest.raises(StaleWeights, match="another run"):
        engine.generate([[6, 7]], sampling(), [5], version=1, on_finished=on_finished)
    assert finished == [0]


@pytest.mark.slow
@pytest.mark.vllm
def test_two_runs_cannot_mix_their_weights(server):
    foreign, control = BucketServer("127.0.0.1"), Endpoint(server.url, 5, KEY)
    engine = VLLMServer(server.url)
    engine.wake(("weights",))
    with offered(foreign, pack(buckets_of(tiny(2))[0])) as url, ThreadPoolExecutor(1) as pool:

        def interrupted():
            first, *rest = buckets_of(tiny(1))
            yield first
            asked.append(pool.submit(control.post, "/update_weights", update_info={"url": url}))
            time.sleep(0.5)
            yield from rest

        asked = []
        with pytest.raises(EngineError, match="without a matching start_weight_update"):
            engine.load_weights(1, interrupted())
        with pytest.raises(Refused, match="two trainers"):
            asked[0].result()
    foreign.close()


@pytest.mark.slow
@pytest.mark.vllm
def test_a_completion_follows_from_its_prompt_and_seed_alone(server):
    engine = loaded(server.url, tiny(1))
    prompts = [PROMPTS[0]] * 4 + PROMPTS  # the same prompt under other seeds, too
    seeds = [step_seed(0, i) for i in range(len(prompts))]
    forward = engine.generate(prompts, sampling(), seeds, version=1).completion_ids
    backward = engine.generate(prompts[::-1], sampling(), seeds[::-1], version=1).completion_ids
    assert backward[::-1] == forward
    assert len(set(map(tuple, forward[:4]))) > 1


@pytest.mark.slow
@pytest.mark.vllm
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
@pytest.mark.vllm
def test_a_stop_string_ends_a_completion_in_the_server_too(server):
    changes = {"stop_strings": ("w1", "w3 w"), "temperature": 1.5}
    stops = Stops(sampling(**changes), make_tokenizer())
    prompts = PROMPTS * 4
    rollout = generate(loaded(server.url, tiny(1)), prompts, **changes)
    ended = [stops.end(*row) for row in zip(prompts, rollout.completion_ids, strict=True)]
    assert ended == [
        len(ids) if reason == "stop" else None
        for ids, reason in zip(rollout.completion_ids, rollout.finish_reasons, strict=True)
    ]
    by_text = [ids for ids, end in zip(rollout.completion_ids, ended, strict=True) if end]
    assert any(ids[-1] != 1 for ids in by_text)
    assert all(len(row) == len(ids) for row, ids in zip(rollout.logps, rollout.completion_ids))  # noqa: B905


@pytest.mark.slow
@pytest.mark.vllm
def test_each_completion_is_announced_once(server):
    engine, seen = loaded(server.url, tiny(1)), {}
    rollout = engine.generate(
        PROMPTS, sampling(), seeds_of(PROMPTS), version=1, on_finished=seen.__setitem__
    )
    assert [seen[i] for i in range(len(PROMPTS))] == rollout.completion_ids


@pytest.mark.slow
@pytest.mark.vllm
def test_further_settings_reach_the_server(server):
    rollout = generate(loaded(server.url, tiny(1)), extra={"allowed_token_ids": [7, 8]})
    assert set().union(*rollout.completion_ids) <= {7, 8}


@pytest.mark.slow
@pytest.mark.vllm
def test_settings_that_the_server_would_ignore_are_refused(server):
    engine = loaded(server.url, tiny(1))
    with pytest.raises(ValueError, match="num_beams"):
        generate(engine, extra={"num_beams": 2})


@pytest.mark.slow
@pytest.mark.vllm
def test_what_the_server_refuses_is_passed_on(server):
    engine = loaded(server.url, tiny(1))
    with pytest.raises(EngineError, match=r"top_p must be in \(0, 1\]"):
        generate(engine, top_p=-1.0)


@pytest.mark.slow
@pytest.mark.vllm
def test_a_prompt_too_long_names_the_settings(server):
    engine = loaded(server.url, tiny(1))
    with pytest.raises(ValueError, match=r"--max-model-len 132, or lower max_completion_length"):
        generate(engine, [[6] * 120])


@pytest.mark.slow
@pytest.mark.vllm
def test_the_other_processes_wait_for_the_main_one_and_ask_for_themselves(server):
    model, both, gathered = tiny(1), threading.Barrier(2, timeout=300), []

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
@pytest.mark.vllm
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
@pytest.mark.vllm
def test_weights_change_in_flight_and_each_token_is_of_the_policy_that_its_version_names(server):
    """The stand-in of test_vllm_servers.py is to answer as this server."""
    models, long = [tiny(1), tiny(2), tiny(3)], sampling(max_new_tokens=100, stop_token_ids=())
    engine = VLLMServers([server.url], vocab_size=32)
    prompts = [[6 + seed % 20, 7, 8] for seed in range(24)]

    def load(version: int) -> None:
        if engine.version is not None:
            engine.sleep(0)
        engine.wake(("weights",))
        engine.load_weights(version, buckets_of(models[version]))
        engine.wake(("kv_cache",))

    load(0)
    prepared = engine.prepare(long, 3)
    with ThreadPoolExecutor(len(prompts)) as pool:
        asked = [pool.submit(engine.complete, p, i, prepared) for i, p in enumerate(prompts)]
        for version in (1, 2):
            time.sleep(0.3)
            load(version)
        found = [future.result() for future in asked]
    engine.close()
    assert max(len(set(sampled.versions)) for sampled in found) > 1
    for prompt, sampled in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt + sampled.ids])
        with torch.no_grad():
            logps = [model(ids).logits[0, 2:-1].log_softmax(-1) for model in models]
        assert sampled.logps is not None
        for place, (version, token) in enumerate(zip(sampled.versions, sampled.ids, strict=True)):
            assert abs(float(logps[version][place, token]) - sampled.logps[place]) < 1e-4


@pytest.mark.slow
@pytest.mark.vllm
def test_a_server_that_dies_is_named_with_what_to_do(server):  # the last test that needs it
    engine = loaded(server.url, tiny(1))
    killed = []

    def on_finished(index: int, ids: list[int]) -> None:
        if not killed:
            killed.append(index)
            server.kill()

    long = sampling(max_new_tokens=MAX_MODEL_LEN - 2, stop_token_ids=())
    with pytest.raises(EngineError, match=r"is gone .*resume_from_checkpoint"):
        engine.generate([[6, 7]] * 64, long, range(64), version=1, on_finished=on_finished)
    assert killed
