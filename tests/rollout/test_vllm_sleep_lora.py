"""What a sleep at level 2 does to vLLM's LoRA: everything that loading the model allocated is lost,
save its buffers, which vLLM keeps; parameters come with the next sync, and the rest is put back.

The engine is the real one, on a CPU; in place of its allocator a stand-in, which knows what was
made while vLLM loaded its model, and fills it with NaN.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.gpu_smoke.device import HostPool
from rloo_fast.records import Sampling
from rloo_fast.weight_sync.unmerged import adapter_shape, policy_buckets
from tests.rollout.test_vllm_server import largest_error, move
from tests.support.serving import tiny
from tests.support.tiny import require_vllm

require_vllm()
pytestmark = [pytest.mark.slow, pytest.mark.vllm]
PROMPTS = [[6 + (3 * i + j) % 26 for j in range(4 + i)] for i in range(4)]
SAMPLING = Sampling(
    temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0, max_new_tokens=8,
    stop_token_ids=(1,),
)  # fmt: skip


class Lost(HostPool):
    """Tensors that were made in it, and what a sleep leaves of them."""

    def sleep(self, offload_tags=()):
        super().sleep(offload_tags)
        for _, block in self._blocks.values():
            block.fill_(0xFF)  # NaN, or -1


@pytest.fixture(scope="module")
def made():
    """(policy with LoRA, its engine, the pool that the engine's model lies in)."""
    from vllm.v1.worker import cpu_model_runner

    from rloo_fast.rollout.vllm.colocate import VLLMEngine

    policy = get_peft_model(tiny(1), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
    policy.eval()
    move(policy)
    pool, load = Lost(), cpu_model_runner.CPUModelRunner.load_model

    def in_pool(*args, **named):
        with pool.use_memory_pool("weights"):
            return load(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_model_runner.CPUModelRunner, "load_model", in_pool)
        engine = VLLMEngine(
            policy.get_base_model(),
            dtype=torch.float32,
            adapter=adapter_shape(policy),
            engine_kwargs={"kv_cache_memory_bytes": 32 << 20, "max_num_seqs": 8},
        )
    yield policy, engine, pool
    engine.close()


@contextmanager
def level_2(engine, pool, *, restore: bool):
    """A sleep, as `VLLMEngine._sleep` and vLLM's worker have it; inside, the engine is asleep."""
    (count,) = engine.llm.apply_model(engine._loose.save)
    kept = engine.llm.apply_model(lambda m: {n: b.clone() for n, b in m.named_buffers()})[0]
    engine._has_base = False
    pool.sleep()
    yield count
    pool.wake_up(["weights"])
    engine.llm.apply_model(lambda m: [b.copy_(kept[n]) for n, b in m.named_buffers()] and None)
    if restore:
        engine.llm.apply_model(engine._loose.restore)


def error_after_sync(policy, engine, version: int) -> float:
    engine.wake(("weights",))
    assert engine.wanted == "base+adapter"
    engine.load_weights(version, policy_buckets(policy, 20_000, torch.float32, engine.wanted))
    engine.wake(("kv_cache",))
    rollout = engine.generate(PROMPTS, SAMPLING, range(len(PROMPTS)), version=version)
    engine.sleep(0)
    return largest_error(rollout, policy, PROMPTS)


def test_the_adapter_is_right_after_every_sleep(made):
    policy, engine, pool = made
    for version in range(3):
        with level_2(engine, pool, restore=True) as count:
            assert count > 10, "the layers' LoRA is neither in parameters nor in buffers"
        assert error_after_sync(policy, engine, version) < 1e-4
        move(policy)


def test_the_stand_in_really_loses_what_is_not_put_back(made):
    policy, engine, pool = made
    with level_2(engine, pool, restore=False):
        stacked = [
            tensor
            for layer in engine.llm.apply_model(lambda m: list(m.lora_manager.modules.values()))[0]
            for tensor in (*layer.lora_a_stacked, *layer.lora_b_stacked)
        ]
        assert len(stacked) > 10
        assert all(bool(tensor.isnan().all()) for tensor in stacked)
    engine.llm.apply_model(engine._loose.restore)
    assert error_after_sync(policy, engine, 9) < 1e-4
