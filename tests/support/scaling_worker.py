"""One rank of test_scaling: a tiny model's step in every engine; what it holds and what it sends.

python -m tests.support.scaling_worker OUT_JSON MODEL_DIR CASES_JSON  (2 processes, under torchrun)

CASES_JSON: {case: {"engine", "lora", "micro_batches", "reduce_every_micro_batch", "live"}}.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from rloo_kernels import fused_linear_rloo_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from rloo_fast.distributed.base import TrainingEngine
from rloo_fast.distributed.fsdp2 import FSDP2, adjust
from rloo_fast.distributed.inside_forward import run_inside
from rloo_fast.distributed.zero import Zero, Zero3
from rloo_fast.models.adapters import base_causal_lm
from rloo_fast.models.reference import StartWeights
from rloo_fast.weight_sync.buckets import weight_buckets
from tests.support.cpu_engines import import_deepspeed

IDS = torch.arange(12)[None]
OPERATIONS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}


class Payloads(TorchDispatchMode):
    """Bytes of the whole tensors that collectives gather, scatter or reduce, per collective."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = OPERATIONS.get(func._schema.name.removeprefix("c10d::"))
        tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        if name and tensors[0].numel() > 1:  # flags and norms are single numbers
            self.bytes[name] += max(t.nbytes for t in tensors)
        elif func._schema.name == "_c10d_functional::all_gather_into_tensor":
            self.bytes["all-gather"] += args[0].nbytes * dist.get_world_size()
        return func(*args, **(kwargs or {}))


def held(tensors) -> int:
    """Bytes of the storages of this process' part of the tensors, views and all."""
    parts = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in parts}
    return sum(storage.nbytes() for storage in storages.values())


def state_of(optimizer) -> int:
    values = [v for state in optimizer.state.values() for v in state.values()]
    return held(v for v in values if v.dim())


def loss_of(wrapped, model, with_head):
    """The fused loss inside the wrapped model's forward, as Policy runs it."""
    base = base_causal_lm(model)

    def forward():
        hidden = base.model(input_ids=IDS).last_hidden_state[0]

        def fused(weight, bias):
            sequences, credit = torch.tensor([0, 6, 12]), torch.tensor([1.0, -1.0])
            x = hidden.to(weight.dtype)
            return fused_linear_rloo_loss(x, weight, IDS[0], sequences, advantages=credit).loss

        return with_head(base.lm_head, fused)

    return run_inside(wrapped, model, forward)


def fsdp2(model: Any, case) -> dict:
    from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, cpu_ram_efficient_loading=False,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )  # fmt: skip
    plugin.set_mixed_precision("bf16")
    adjust(plugin)
    accelerator: Any = SimpleNamespace(  # what the function reads of one
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16",
        device=torch.device("cpu"),
        is_main_process=False,
    )
    parallel = FSDP2(accelerator)
    model = fsdp2_prepare_model(accelerator, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    head = parallel.with_head
    found = {"held": {}, "payload": {}}

    def step(reducing):
        for i in range(case["micro_batches"]):
            model.set_requires_gradient_sync(reducing or i == case["micro_batches"] - 1)
            loss_of(model, model, head).backward()
            if i == 0 and not reducing:
                found["held"]["whole gradients, not reduced yet"] = held(unsharded_gradients(model))

    with Payloads() as sent:
        step(case["reduce_every_micro_batch"])
    found["payload"]["update"] = sent.bytes
    found["held"]["gradients"] = held(p.grad for p in trained)
    optimizer.step()
    found["held"]["policy weights"] = held(model.parameters())
    found["held"]["optimizer state"] = state_of(optimizer)
    if case["lora"]:
        found["held"]["adapters at the start"] = held(start_weights_of(model))
    else:
        reference = parallel.reference(load(case["model"]).requires_grad_(False))
        found["held"]["reference"] = held(reference.parameters())
        with Payloads() as sent, torch.no_grad():
            for _ in range(case["micro_batches"]):
                loss_of(reference, reference, head)
        found["payload"]["reference"] = sent.bytes
    with Payloads() as sent:
        drain(weight_buckets(model, 1 << 20, torch.bfloat16))
    found["payload"]["weights to the engine"] = sent.bytes
    return found


def start_weights_of(model):
    start = StartWeights(model)
    start.take()
    return [part for parts in start._held.values() for part in parts]


def drain(buckets) -> None:
    for _ in buckets:
        pass


def unsharded_gradients(model) -> list:
    units = [m._get_fsdp_state() for m in model.modules() if hasattr(m, "_get_fsdp_state")]
    groups = [unit._fsdp_param_group for unit in dict.fromkeys(units) if unit._fsdp_param_group]
    params = [p for group in groups for p in group.fsdp_params]
    kept = [p.unsharded_accumulated_grad for p in params]
    kept += [p._unsharded_param.grad for p in params]
    return [grad for grad in kept if grad is not None]


def zero(model, case) -> dict:
    deepspeed = import_deepspeed()
    config = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "steps_per_print": 10**9,
        "gradient_accumulation_steps": case["micro_batches"], "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": int(case["engine"][-1]), "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": case["live"],
            "stage3_max_reuse_distance": case["live"], "reduce_bucket_size": 64 * 64,
        },
    }  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    plugin = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    parallel = Zero3 if case["engine"] == "zero3" else Zero
    head = parallel(SimpleNamespace(state=plugin)).with_head  # pyright: ignore
    found = {"held": {}, "payload": {}}

    def step():
        for _ in range(case["micro_batches"]):
            engine.backward(loss_of(engine, model, head))
            if engine.is_gradient_accumulation_boundary():
                found["held"] |= gradients_of(engine.optimizer)
            engine.step()

    step()  # the first step records the order of layers
    step()
    with Payloads() as sent:
        step()
    found["payload"]["update"] = sent.bytes
    found["held"]["policy weights"] = held(weights_of(engine.optimizer, model))
    found["held"]["optimizer state"] = state_of(optimizer)
    found["held"]["float32 master weights"] = held(masters_of(engine.optimizer))
    if case["lora"]:
        found["held"]["adapters at the start"] = held(start_weights_of(model))
    if case["engine"] == "zero3":
        with Payloads() as sent:
            drain(weight_buckets(model, 1 << 20))
        found["payload"]["weights to the engine"] = sent.bytes
    return found


def gradients_of(optimizer) -> dict:
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        return {"gradient buffers": held([optimizer.grad_partitions_flat_buffer])}
    return {"gradients": held(g for group in optimizer.averaged_gradients.values() for g in group)}


def weights_of(optimizer, model) -> list:
    """The parameters' own parts, and the flat tensors that the optimizer has of them."""
    names = ("fp16_partitioned_groups_flat", "bit16_groups_flat")
    flat = next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))
    return [getattr(p, "ds_tensor", p) for p in model.parameters()] + list(flat)


def masters_of(optimizer) -> list:
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    return next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))


def ddp(model, case) -> dict:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    buckets = {}
    wrapped = torch.nn.parallel.DistributedDataParallel(model)

    def count(group, bucket):
        buckets[bucket.buffer().data_ptr()] = bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, count)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(wrapped, model, TrainingEngine(None).with_head)  # pyright: ignore
    loss.backward()
    gradients = held(p.grad for p in trained)
    optimizer.step()
    held_now = {
        "policy weights": held(model.parameters()), "gradients": gradients,
        "gradient buffers": sum(buckets.values()), "optimizer state": state_of(optimizer),
    }  # fmt: skip
    return {"held": held_now, "payload": {"update": {"all-reduce": sum(buckets.values())}}}


def load(directory: str):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def prepare(case):
    model = load(case["model"])
    if case["lora"]:
        adapters = LoraConfig(r=case["lora"], target_modules=["q_proj", "v_proj"])
        model = get_peft_model(model, adapters)  # the adapters in float32
    return model.float() if case["engine"] == "ddp" else model


def main(out: str, model_dir: str, cases: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    run = {"fsdp2": fsdp2, "zero3": zero, "zero2": zero, "ddp": ddp}
    for name, case in cases.items():
        case["model"] = model_dir
        found[name] = run[case["engine"]](prepare(case), case)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo of torch 2.13 sometimes aborts in its destructor, after correct results


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
