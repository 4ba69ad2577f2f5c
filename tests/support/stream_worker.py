"""One rank of test_weight_sync_sharded: shards models, streams their weights, notes what it saw.

python -m tests.support.stream_worker OUT_FILE CASES_JSON      (under torchrun)

CASES_JSON: {case: {look, engine, model, dtype, lora}}. OUT_FILE: {case: [facts per rank]}.
"""

import gc
import json
import os
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from rloo_fast.models.adapters import base_causal_lm
from rloo_fast.rollout.cycle import RolloutCycle
from rloo_fast.weight_sync.buckets import weight_buckets
from rloo_fast.weight_sync.unmerged import PREFIX, Parted, policy_buckets
from tests.rollout.test_cycle import PROMPTS, SAMPLING, SEEDS
from tests.support.cpu_engines import LIKE_A_LARGE_MODEL, import_deepspeed
from tests.support.fake_engine import FakeEngine
from tests.weight_sync.test_buckets import CONFIGS, adapted, make

SMALL_BUCKET = 10_000  # bytes: a few weights of the tiny models
BUCKET = 2**21  # four of the largest matrices below, in float32
CONFIGS["big"] = LlamaConfig(
    vocab_size=501, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
TOKENS = torch.arange(14).view(2, 7)


def build(name, dtype, lora):
    dtype = getattr(torch, dtype)
    model = adapted(name, target_modules="all-linear") if lora else make(name)
    return model.to(dtype)


# The engines


def fsdp2(model, shape, names):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in base_causal_lm(model).base_model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def zero3(model):
    deepspeed = import_deepspeed()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": trained[0].dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        # norms and adapters stay whole, all else is partitioned, and gathered a few at a time
        "zero_optimization": {
            **LIKE_A_LARGE_MODEL,
            "stage": 3,
            "stage3_param_persistence_threshold": 256,
        },
    }
    optimizer = torch.optim.SGD(trained, lr=1.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


ENGINES = {
    "plain": lambda model: model,
    "fsdp2": lambda model: fsdp2(model, (2,), ("shard",)),
    "hsdp": lambda model: fsdp2(model, (1, 2), ("replicate", "shard")),
    "zero3": zero3,
}


def step(wrapped):
    """One optimizer step, then a forward that leaves things as an evaluation does."""
    loss = wrapped(input_ids=TOKENS, labels=TOKENS).loss
    if hasattr(wrapped, "step"):
        wrapped.backward(loss)
        wrapped.step()
    else:
        loss.backward()
        torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0).step()
    with torch.no_grad():
        wrapped(input_ids=TOKENS)


def gathered_by_engine(wrapped):
    """The full state dict, by the engine's own means, on every rank."""
    if not hasattr(wrapped, "step"):
        return get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    found = [wrapped._zero3_consolidated_16bit_state_dict()]
    dist.broadcast_object_list(found)
    return found[0]


# What is looked at


def streamed(model, dtype=None):
    """(copies of the weights, names in each bucket)"""
    weights, cuts = {}, []
    for bucket in weight_buckets(model, SMALL_BUCKET, dtype):
        cuts.append([name for name, _ in bucket])
        weights |= {name: tensor.clone() for name, tensor in bucket}
    return weights, cuts


def differing(found, expected):
    """Names in only one of the two, or whose bits differ."""
    both = found.keys() & expected.keys()
    same = {n for n in both if found[n].dtype == expected[n].dtype and found[n].equal(expected[n])}
    return sorted((found.keys() | expected.keys()) - same)


def held(model):
    """How much of every parameter this rank has."""
    sizes = {}
    for name, p in model.named_parameters():
        shard = p.to_local() if isinstance(p, DTensor) else getattr(p, "ds_tensor", p)
        sizes[name] = (shard.numel(), p.numel(), str(getattr(p, "ds_status", "")))
    return sizes


def whole(model):
    """Names of the parameters that ZeRO-3 has whole on every rank."""
    statuses = {name: getattr(p, "ds_status", None) for name, p in model.named_parameters()}
    return {name for name, status in statuses.items() if status and status.name == "AVAILABLE"}


def look_at_weights(model, wrapped, expected, cuts):
    before = held(model)
    found, cuts_found = streamed(model)
    return {
        "differing": differing(found, expected),
        "cut otherwise": cuts_found != cuts,
        "gathered afterwards": held(model) != before,
    }


def look_at_parts(model, wrapped, expected, cuts):
    """Frozen weights and adapter apart: W + B A of them is the merged weight."""
    before = held(model)
    parted = Parted(policy_buckets(model, SMALL_BUCKET, torch.float32, "base+adapter"))
    found = {name: weight.clone() for name, weight in parted}
    merged = 0
    for name, a in parted.adapter.items():
        if name.endswith("lora_A.weight"):
            b = parted.adapter[name.replace("lora_A", "lora_B")]
            layer = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            found[f"{layer}.weight"] += b @ a
            merged += 1
    assert merged
    assert found.keys() == expected.keys()
    return {
        "differing": [n for n, w in found.items() if not torch.allclose(w, expected[n], atol=1e-5)],
        "cut otherwise": False,
        "gathered afterwards": held(model) != before,
    }


def look_at_rounded(model, wrapped, expected, cuts):
    """Float32 shards for an engine in bfloat16: rounded first, so half the bytes are gathered."""
    rounded = {name: weight.bfloat16() for name, weight in expected.items()}
    found, cuts_found = streamed(model, torch.bfloat16)
    return {
        "differing": differing(found, rounded),
        "cut otherwise": len(cuts_found) >= len(cuts),
        "gathered afterwards": False,
    }


def look_after_step(model, wrapped, expected, cuts):
    step(wrapped)
    before = whole(model)
    found, _ = streamed(model)
    kept_whole = whole(model) == before
    after = gathered_by_engine(wrapped)
    return {
        "differing": differing(found, after),
        "changed": len(differing(after, expected)),
        "kept whole": kept_whole,
    }


def look_after_failure(model, wrapped, expected, cuts):
    before, engine = held(model), FakeEngine()
    cycle = RolloutCycle(engine, lambda: 0, lambda: weight_buckets(model, SMALL_BUCKET))
    engine.fails_after, failed = 1, ""
    try:
        cycle.generate(PROMPTS, SAMPLING, SEEDS)
    except RuntimeError as error:
        failed = str(error)
    gathered_afterwards = held(model) != before
    step(wrapped)
    return {"failed": failed, "gathered afterwards": gathered_afterwards}


class LoadingEngine(FakeEngine):
    """Copies what comes into weights of its own, one by one, as vLLM's loaders do."""

    def _load(self, version, buckets):
        weights = (named for bucket in buckets for named in bucket)
        for name, tensor in weights:
            self.weights[name].copy_(tensor)


def look_at_memory(model, wrapped, expected, cuts):
    engine = LoadingEngine()
    engine.weights = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    cycle = RolloutCycle(engine, lambda: 0, lambda: weight_buckets(model, BUCKET))
    gc.collect()
    with LiveBytes() as live:
        cycle.generate(PROMPTS, SAMPLING, SEEDS)
    gc.collect()
    return {
        "differing": differing(engine.weights, expected),
        "peak": live.peak,
        "kept": live.total,
        "model": sum(tensor.nbytes for tensor in expected.values()),
        "bucket": BUCKET,
    }


class LiveBytes(TorchDispatchMode):
    """Bytes of the memory that operators made inside the block: now, and at most at a time.

    A weak reference to each piece says when it went, on whatever thread: one of gloo's may be the
    last to let go of a tensor, which the allocator's own record of a thread would not show.
    """

    def __init__(self):
        super().__init__()
        self.total = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage._cdata for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            if storage._cdata not in given and storage not in self.known:
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, nbytes):
        self.total += nbytes
        self.peak = max(self.peak, self.total)


def storages(values):
    tensors = (x for x in tree_leaves(values) if isinstance(x, torch.Tensor))
    return [x.untyped_storage() for x in tensors if not isinstance(x, DTensor)]


def main(out, cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    facts = {}
    for name, case in cases.items():
        model = build(case["model"], case["dtype"], case["lora"])
        expected, cuts = streamed(model)
        wrapped = ENGINES[case["engine"]](model)
        facts[name] = [None, None]
        found = globals()[case["look"]](model, wrapped, expected, cuts)
        dist.all_gather_object(facts[name], found)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo of torch 2.13 sometimes aborts in its destructor, after correct results


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
