"""Sleep and wake as on a GPU, call by call: a stand-in for vLLM, whose weights are gone after a
sleep at level 2, takes the place of vllm.LLM; the engine, the cycle and the trainer are the real
ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.data import longest_prompt
from rloo_fast.rollout.engine import EngineError
from rloo_fast.rollout.vllm import colocate as rollout_vllm
from rloo_fast.weight_sync.sampler_check import SamplerMismatch
from tests.support.tiny import make_model, make_tokenizer

PROMPTS = Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(8)]})
calls: list = []


class FakeLLM:
    """What VLLMEngine uses of vllm.LLM, computed with the policy's own architecture."""

    def __init__(self, **settings):
        calls.append(("LLM", settings))
        self.settings, self.waiting = settings, []
        self.model = make_model(seed=99).eval()
        self.model.load_weights = self.load_weights
        self.scale = torch.ones(1)  # a tensor that is neither a parameter nor a buffer
        self.model.lm_head.scales = [self.scale]
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(model_config=SimpleNamespace(quantization=None)),
            engine_core=SimpleNamespace(shutdown=lambda: calls.append(("shutdown",))),
            add_request=lambda *request: self.waiting.append(request),
            step=self.step,
            abort_request=lambda ids: None,
        )

    def load_weights(self, weights):
        names = dict(self.model.named_parameters())
        for name, tensor in weights:
            names[name].copy_(tensor)

    def sleep(self, level):
        calls.append(("sleep", level))
        for parameter in self.model.parameters():
            parameter.data.fill_(1e9)  # whatever was in that memory
        self.scale.fill_(1e9)

    def wake_up(self, tags):
        calls.append(("wake_up", tags))

    def apply_model(self, function):
        calls.append(("apply_model", function.__name__))
        return [function(self.model)]

    def reset_prefix_cache(self):
        calls.append(("reset_prefix_cache",))
        return True

    def step(self):
        calls.append(("step", len(self.waiting)))
        outputs = [self.sample(*request) for request in self.waiting]
        self.waiting.clear()
        return outputs

    @torch.no_grad()
    def sample(self, request_id, prompt, params):
        generator = torch.Generator().manual_seed(params["seed"])
        ids, logps = list(prompt["prompt_token_ids"]), []
        for _ in range(params["max_tokens"]):
            logits = self.model(torch.tensor([ids])).logits[0, -1] * self.scale
            logits = logits / params["temperature"]
            scores = logits.log_softmax(-1)
            ids.append(int(torch.multinomial(scores.exp(), 1, generator=generator)))
            logps.append({ids[-1]: SimpleNamespace(logprob=scores[ids[-1]].item())})
        new = ids[len(prompt["prompt_token_ids"]) :]
        output = SimpleNamespace(token_ids=new, logprobs=logps, finish_reason="length")
        return SimpleNamespace(finished=True, request_id=request_id, outputs=[output])


class RecordingRoom:
    is_made = False

    def make(self):
        calls.append(("room.make",))
        self.is_made = True

    def give_back(self):
        calls.append(("room.give_back",))
        self.is_made = False


def make_trainer(tmp_path, monkeypatch, train=PROMPTS, evaluation=None, **fields) -> RLOOTrainer:
    calls.clear()
    fake = SimpleNamespace(
        LLM=FakeLLM,
        SamplingParams=lambda **settings: settings,
        sampling_params=SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY="final")),
        envs=SimpleNamespace(VLLM_CACHE_ROOT=str(tmp_path)),
    )
    monkeypatch.setattr(rollout_vllm, "import_vllm", lambda: fake)
    monkeypatch.setattr(rollout_vllm, "runs_on_cpu", lambda: False)
    common = dict(
        per_device_train_batch_size=8, num_generations=4, max_steps=3, max_completion_length=4,
        learning_rate=0.01, beta=0.1, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, gradient_checkpointing=False, use_vllm=True,
        vllm_enable_sleep_mode=True,
    )  # fmt: skip
    args: Any = RLOOConfig(str(tmp_path), **{**common, **fields})
    reward = lambda completion_ids, **kwargs: [float(sum(ids)) for ids in completion_ids]  # noqa: E731
    return RLOOTrainer(
        make_model(), reward, args, train, evaluation, processing_class=make_tokenizer()
    )


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A run as on a GPU with vllm_enable_sleep_mode=True; forwards and updates are recorded."""
    made = make_trainer(
        tmp_path, monkeypatch, vllm_gpu_memory_utilization=0.4, vllm_max_model_length=96
    )
    made.rollouts.room = RecordingRoom()
    for name, stage in (("reference", made.reference), ("policy", made.policy)):
        record(stage, "_run", name)
    return made


def record(holder, method, name):
    real = getattr(holder, method)

    def recorded(*args, **kwargs):
        if not calls or calls[-1] != (name,):
            calls.append((name,))
        return real(*args, **kwargs)

    setattr(holder, method, recorded)


ROLLOUT = [
    ("room.make",),
    ("wake_up", ["weights"]),
    ("apply_model", "restore"),
    ("apply_model", "load"),  # poison, load, check
    ("reset_prefix_cache",),
    ("wake_up", ["kv_cache"]),
    ("step", 8),
    ("apply_model", "save"),
    ("sleep", 2),
    ("room.give_back",),
]


def test_the_order_of_calls_in_a_run(trainer):
    start, *rest = calls
    # asleep from the start, so that the first step trains with all memory
    assert rest == [("apply_model", "reason"), ("apply_model", "save"), ("sleep", 2)]
    assert start[1] | {"model": None} == {
        "model": None, "load_format": "rloo_fast", "skip_tokenizer_init": True,
        "generation_config": "vllm", "dtype": "float32", "max_model_len": 96,
        "tensor_parallel_size": 1, "gpu_memory_utilization": 0.4, "model_impl": "vllm",
        "enable_sleep_mode": True, "logprobs_mode": "processed_logprobs", "seed": 42,
        "language_model_only": True, "moe_backend": "triton",
        "max_num_seqs": 8, "sleep_mode_offload_cudagraph": True,
    }  # fmt: skip
    calls.clear()
    record(trainer, "_choose_layout", "step")
    trainer.train()
    one_step = [("step",), *ROLLOUT, ("reference",), ("policy",)]
    while ("step",) in calls and calls[0] != ("step",):
        calls.pop(0)
    tried = [call for call in calls if call != ("policy",)]  # the layout's trial run is one, too
    assert tried == [call for call in one_step * 3 if call != ("policy",)]
    differences = [row["sampling/logp_diff_max"] for row in trainer.state.log_history[:-1]]
    assert max(differences) < 1e-5


def test_a_prefix_cache_that_stays_ends_the_run(trainer):
    trainer.rollouts.engine.llm.reset_prefix_cache = lambda: False
    with pytest.raises(EngineError, match="kept its prefix cache when policy version 1"):
        trainer.train()


def test_weights_that_come_back_by_themselves_are_not_trusted(trainer):
    """As if wake restored the checkpoint that the engine started from."""
    engine = trainer.rollouts.engine
    wake = engine.llm.wake_up

    def wake_up(tags):
        wake(tags)
        if tags == ["kv_cache"]:
            engine.llm.model.load_state_dict(make_model(seed=99).state_dict())

    engine.llm.wake_up = wake_up
    with pytest.raises(SamplerMismatch):
        trainer.train()


def test_evaluation_wakes_and_syncs_the_engine_too(trainer):
    trainer.train()
    calls.clear()
    trainer.evaluate(PROMPTS)
    assert calls[: len(ROLLOUT)] == [c if c[0] != "step" else calls[6] for c in ROLLOUT]


def test_the_engine_is_closed_before_the_process_groups_are(trainer, monkeypatch):
    monkeypatch.setattr(trainer.accelerator, "end_training", lambda: calls.append(("end",)))
    trainer.end()
    assert calls[-2:] == [("shutdown",), ("end",)]
    trainer.rollouts.close()  # twice is once
    assert calls[-1] == ("end",)


def longer(num_words: int) -> Dataset:
    return Dataset.from_dict(
        {"prompt": ["w1 w2", " ".join(f"w{i % 26}" for i in range(num_words))]}
    )


def started_with(name: str):
    return calls[0][1][name]


def test_the_engine_is_laid_out_for_the_longest_prompt_and_a_completion(tmp_path, monkeypatch):
    made = make_trainer(tmp_path, monkeypatch, evaluation=longer(7))
    assert started_with("max_model_len") == 7 + 4
    assert made.model.config.max_position_embeddings > 11
    assert started_with("max_num_seqs") == 8
    assert started_with("gpu_memory_utilization") > 0.3
    with pytest.raises(ValueError, match="set vllm_max_model_length"):
        made.evaluate(longer(8))


def test_longer_prompts_are_left_out_by_the_length_that_the_engine_is_given(tmp_path, monkeypatch):
    make_trainer(tmp_path, monkeypatch, evaluation=longer(50), max_prompt_length=9)
    assert started_with("max_model_len") == 9 + 4


def test_a_length_that_was_given_is_taken(tmp_path, monkeypatch):
    make_trainer(tmp_path, monkeypatch, vllm_max_model_length=50)
    assert started_with("max_model_len") == 50
    given = {"max_model_len": 60, "max_num_seqs": 2}
    made = make_trainer(tmp_path / "2", monkeypatch, vllm_engine_kwargs=given)
    assert (started_with("max_model_len"), started_with("max_num_seqs")) == (60, 2)
    with pytest.raises(ValueError, match="only 56 fit"):
        made.evaluate(longer(57))


def test_a_stream_that_gets_longer_says_what_to_set(tmp_path, monkeypatch):
    def rows():
        yield from ({"prompt": "w1 w2 w3"} for _ in range(4))
        yield from ({"prompt": " ".join(["w1"] * 7)} for _ in range(4))

    monkeypatch.setattr(longest_prompt, "OF_A_STREAM", 4)
    stream = IterableDataset.from_generator(rows)
    fields = {"shuffle_dataset": False, "vllm_enable_sleep_mode": False}
    made = make_trainer(tmp_path, monkeypatch, stream, **fields)
    assert started_with("max_model_len") == 2 * 3 + 4
    assert started_with("gpu_memory_utilization") == 0.3  # it does not sleep
    with pytest.raises(ValueError, match=r"has 7 tokens.*set vllm_max_model_length"):
        made.train()
