"""vLLM with images, on a CPU: it samples from the policy's image tower and from its prompts.

Only Idefics3 can be run by a vLLM without torchvision; with it, the other families are as well.
`python -m tests.rollout.test_vllm_images` prints the table: family -> largest difference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers.utils.import_utils import is_torchvision_available

from rloo_fast.models.vision import ImageReader
from rloo_fast.records import RawPrompt, Sampling
from rloo_fast.rollout.engine import EngineError
from rloo_fast.weight_sync.buckets import weight_buckets
from tests.end_to_end.test_image_runs import make_trainer
from tests.policy.test_image_layouts import K, alone, message_lists
from tests.support.batches import generation_batch
from tests.support.serving import serving
from tests.support.tiny import require_vllm
from tests.support.vision import NUMBER, make_processor, make_vision_model

require_vllm()

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
FAMILIES = ["idefics3"]
if is_torchvision_available():
    FAMILIES += ["smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"]
    FAMILIES += ["llava_next", "internvl"]
SAMPLING = Sampling(
    temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0, max_new_tokens=8,
    stop_token_ids=(1, NUMBER["<image>"]),
)  # fmt: skip
TOLERANCE = 3e-5  # vLLM's kernels are others
BUCKET = 20_000


class Served:
    """A model, its engine, and prompts with one image, none, and two, K times each.

    `engine`: made of the model and its processor.
    """

    def __init__(self, family: str, engine: Callable[..., Any]):
        self.model, processor = make_vision_model(family, wide=True), make_processor(family)
        reader = ImageReader(processor, self.model)
        prompts = [
            (*reader.chat(messages, {}), RawPrompt(reader.raw_ids(messages, {}), images))
            for messages, images in message_lists()
        ]
        self.rows = [prompt for prompt in prompts for _ in range(K)]
        self.engine = engine(self.model, processor)
        self.version, self.level = 0, 2

    def load(self, without: str = "nothing") -> None:
        self.version += 1
        if self.version > 1 and self.engine.version is not None:
            self.engine.sleep(self.level)
        if self.engine.state.name == "ASLEEP":
            self.engine.wake(("weights",))
        kept = (
            [(name, tensor) for name, tensor in bucket if without not in name]
            for bucket in weight_buckets(self.model, BUCKET)
        )
        self.engine.load_weights(self.version, kept)
        self.engine.wake(("kv_cache",))

    def sample(self, rows=None):
        rows = rows or self.rows
        return self.engine.generate(
            [ids for ids, _, _ in rows], SAMPLING, list(range(len(rows))), version=self.version,
            inputs=[more for _, more, _ in rows], raw=[raw for _, _, raw in rows],
        )  # fmt: skip

    def difference(self) -> float:
        rollout = self.sample()
        batch = generation_batch(
            [ids for ids, _, _ in self.rows], rollout.completion_ids,
            inputs=[more for _, more, _ in self.rows],
        )  # fmt: skip
        logps = torch.tensor([x for row in rollout.logps or [] for x in row])
        return float((logps - alone(self.model, batch)).abs().max())


def in_process(model, processor):
    from rloo_fast.rollout.vllm.colocate import VLLMEngine

    return VLLMEngine(
        model, dtype=torch.float32, processor=processor, max_model_length=160,
        engine_kwargs={"kv_cache_memory_bytes": 32 << 20, "max_num_seqs": 16},
    )  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def served(request):
    made = Served(request.param, in_process)
    yield made
    made.engine.close()


def train_tower(model) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vis" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))


def test_samples_are_drawn_from_what_is_trained_on(served):
    served.load()
    assert served.difference() < TOLERANCE


def test_they_follow_an_image_tower_that_was_trained(served):
    """vLLM keeps what a tower has made of an image, and must drop it with the weights."""
    served.load()
    before = served.sample().logps
    train_tower(served.model)
    served.load()
    assert served.difference() < TOLERANCE
    assert served.sample().logps != before


def test_a_weight_of_the_tower_that_was_not_sent_is_named(served):
    with pytest.raises(EngineError, match=r"did not cover.*vis"):
        served.load(without="patch_embed")
    served.load()


def test_another_prompt_than_is_trained_on_is_refused(served):
    served.load()
    ids, more, raw = served.rows[0]
    with pytest.raises(EngineError, match="differ from token 1 on"):
        served.sample([([ids[0], 9, *ids[2:]], more, raw)])
    assert len(served.sample().completion_ids) == len(served.rows)  # nothing is left behind


def test_a_run_samples_with_vllm_and_trains_the_tower_by_lora(tmp_path):
    trainer = make_trainer(
        tmp_path, "idefics3", model=make_vision_model("idefics3", wide=True), use_vllm=True,
        vllm_engine_kwargs={"kv_cache_memory_bytes": 32 << 20}, learning_rate=0.05, max_steps=3,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["sampling/logp_diff_max"] < 1e-3 for log in logs)
    trained = [n for n, p in trainer.model.named_parameters() if "lora_B" in n and p.any()]
    assert any("vision_model" in name for name in trained)
    trainer.rollouts.close()


def test_a_server_is_sent_the_images_and_samples_the_same(tmp_path):
    """Its weights are replaced in flight, and what its tower has made of images goes with them."""
    from rloo_fast.rollout.vllm.servers import VLLMServers

    with serving(tmp_path, family="idefics3") as server:
        served = Served("idefics3", lambda *_: VLLMServers([server.url], has_images=True))
        served.level = 0  # it never sleeps
        served.load()
        assert served.difference() < TOLERANCE
        train_tower(served.model)
        served.load()
        assert served.difference() < TOLERANCE
        ids, more, raw = served.rows[0]
        with pytest.raises(EngineError, match="differ from token 1 on"):
            served.sample([([ids[0], 9, *ids[2:]], more, raw)])
        served.engine.close()


def main() -> None:
    for family in sys.argv[1:] or FAMILIES:
        served = Served(family, in_process)
        served.load()
        print(f"{family:12} {served.difference():9.1e}", flush=True)
        served.engine.close()


if __name__ == "__main__":
    main()
