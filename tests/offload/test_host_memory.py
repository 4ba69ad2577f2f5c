"""Host memory for what moves: how much torch pins for it, and that no block meets another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from rloo_fast.offload.host_memory import HostMemory, pack
from rloo_fast.offload.storages import whole_storage

CONFIGS = {
    "Qwen2.5-7B": lambda: Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "Llama-3.1-8B": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
GIB = 2**30


def pinned(num_bytes: int) -> int:
    """What torch's CachingHostAllocator takes for an allocation, see below."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def adam_state(name: str, shards: int = 1) -> list[int]:
    """Bytes of exp_avg and exp_avg_sq of every parameter, float32, as FSDP2 splits them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    rows = [(p, -(-len(p) // shards)) for p in model.parameters()]
    return [4 * p[:n].numel() for p, n in rows for _ in range(2)]


def slabs_of(sizes: list[int]) -> tuple[list[int], list[torch.Tensor]]:
    """The slabs that these blocks are taken in, and the blocks."""
    asked: list[int] = []

    def new_slab(num_bytes: int) -> torch.Tensor:
        asked.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    return asked, HostMemory(new_slab).take(sizes)


@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_adams_state_pins_little_more_than_itself(name, shards):
    sizes = adam_state(name, shards)
    assert sum(pinned(slab.size) for slab in pack(sizes)) <= 1.1 * sum(sizes)


def test_one_by_one_the_state_of_qwen_would_pin_almost_twice_itself():
    sizes = adam_state("Qwen2.5-7B")
    assert (sum(sizes) // GIB, sum(map(pinned, sizes)) // GIB) == (56, 107)


def test_torch_rounds_each_pinned_allocation_to_a_power_of_two():
    header = Path(torch.__file__).parent / "include/ATen/core/CachingHostAllocator.h"
    if not header.exists():
        pytest.skip("this torch is installed without its headers")
    assert "PowerOf2Ceil(size)" in header.read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pins memory for a real GPU")
def test_a_real_allocator_pins_what_the_model_of_it_says():
    for size in (1, 3 << 20, (4 << 20) + 1):
        before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
        block = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        grown = torch.cuda.host_memory_stats()["allocated_bytes.current"] - before
        assert grown in (0, pinned(size))  # 0: a block that was free
        del block


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 20_000), max_size=40))
def test_blocks_have_their_size_and_share_no_byte(sizes):
    asked, blocks = slabs_of(sizes)
    assert [block.numel() for block in blocks] == sizes
    assert sum(asked) <= 2 * sum(-(-size // 512) * 512 for size in sizes)
    assert all(size == pinned(size) for size in asked)
    for number, block in enumerate(blocks):
        block.fill_(number)
    assert all(bool((block == number).all()) for number, block in enumerate(blocks))


def test_a_block_is_a_storage_of_its_own():
    _, (first, second) = slabs_of([700, 300])
    assert whole_storage(second).numel() == 300  # what torch.save would write of it
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


def test_slabs_are_used_again_and_grow_with_what_is_asked_for():
    asked: list[int] = []

    def new_slab(num_bytes: int) -> torch.Tensor:
        asked.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    memory = HostMemory(new_slab)
    memory.take([4096, 4096])
    memory.take([4096, 4096])
    memory.take([100])
    assert sum(asked) == 8192
    places = {block.data_ptr() for block in memory.take([4096, 4096, 9000])}
    assert len(places) == 3


def test_a_slab_that_is_refused_leaves_the_others_for_the_next_try():
    asked: list[int] = []

    def new_slab(num_bytes: int) -> torch.Tensor:
        if num_bytes > 8192:
            raise RuntimeError("CUDA error: out of memory")
        asked.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    memory = HostMemory(new_slab)
    memory.take([8192])
    with pytest.raises(RuntimeError):
        memory.take([8192, 20_000])
    memory.take([8192])
    assert asked == [8192]
