"""Sleep and wake as on a GPU, call by call: a stand-in for vLLM, whose weights are gone after a
sleep at level 2, takes the place of vllm.LLM; the engine, the cycle and the trainer are the real
ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.rollout import vllm as rollout_vllm
from rloo_fast.truth import SamplerMismatch

PROMPTS = Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(8)]})
calls: list = []


class FakeLLM:
    """What VLLMEngine uses of vllm.LLM, computed with the policy's own architecture."""

    def __init__(self, **settings):
        calls.append(("LLM", settings))
        self.settings, self.waiting = settings, []
        self.model = make_model(seed=99).eval()
        self.model.load_weights = self.load_weights
        self.llm_engine = SimpleNamespace(
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

    def wake_up(self, tags):
        calls.append(("wake_up", tags))

    def apply_model(self, function):
        calls.append(("apply_model",))
        return [function(self.model)]

    def reset_prefix_cache(self):
        calls.append(("reset_prefix_cache",))

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
            logits = self.model(torch.tensor([ids])).logits[0, -1] / params["temperature"]
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


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A run as on a GPU with vllm_enable_sleep_mode=True; forwards and updates are recorded."""
    calls.clear()
    fake = SimpleNamespace(LLM=FakeLLM, SamplingParams=lambda **settings: settings)
    monkeypatch.setattr(rollout_vllm, "import_vllm", lambda: fake)
    monkeypatch.setattr(rollout_vllm, "runs_on_cpu", lambda: False)
    args = RLOOConfig(
        str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_steps=3,
        max_completion_length=4, learning_rate=0.01, beta=0.1, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=False, use_vllm=True, vllm_enable_sleep_mode=True,
        vllm_gpu_memory_utilization=0.4, vllm_max_model_length=96,
    )  # fmt: skip
    reward = lambda completion_ids, **kwargs: [float(sum(ids)) for ids in completion_ids]  # noqa: E731
    made = RLOOTrainer(make_model(), reward, args, PROMPTS, processing_class=make_tokenizer())
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
    ("apply_model",),  # poison, load, check
    ("reset_prefix_cache",),
    ("wake_up", ["kv_cache"]),
    ("step", 8),
    ("sleep", 2),
    ("room.give_back",),
]


def test_the_order_of_calls_in_a_run(trainer):
    start, *rest = calls
    assert rest == [("sleep", 2)]  # from the start, so that the first step trains with all memory
    assert start[1] | {"model": None} == {
        "model": None, "load_format": "dummy", "skip_tokenizer_init": True,
        "generation_config": "vllm", "dtype": "float32", "max_model_len": 96,
        "tensor_parallel_size": 1, "gpu_memory_utilization": 0.4, "model_impl": "vllm",
        "enable_sleep_mode": True, "logprobs_mode": "processed_logprobs", "seed": 42,
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
    assert calls[: len(ROLLOUT)] == [c if c[0] != "step" else calls[5] for c in ROLLOUT]


def test_the_engine_is_closed_before_the_process_groups_are(trainer, monkeypatch):
    monkeypatch.setattr(trainer.accelerator, "end_training", lambda: calls.append(("end",)))
    trainer.end()
    assert calls[-2:] == [("shutdown",), ("end",)]
    trainer.rollouts.close()  # twice is once
    assert calls[-1] == ("end",)
