"""verl's fused log-probs with a vocabulary split over two gloo ranks, by our adapter and by verl.

As a script it prints what the two ranks found as JSON. verl's own kernel needs a GPU; its functions
on split logits (`verl.utils.megatron.tensor_parallel`) do not, given a group. Megatron, of which
they take no more than that, is stood in for.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.kernel_helpers import plain_head

V, TEMPERATURE = 42, 0.7


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden (2, 7, 16), weight (V, 16), labels (2, 7), coefficients of a loss on both results."""
    torch.manual_seed(0)
    labels = torch.randint(V, (2, 7))
    return torch.randn(2, 7, 16), torch.randn(V, 16), labels, torch.randn(14), torch.randn(14)


def stand_in_for_megatron(group: Any) -> None:
    for name in ("megatron", "megatron.core", "megatron.core.parallel_state"):
        sys.modules[name] = ModuleType(name)
    state: Any = sys.modules["megatron.core.parallel_state"]
    core: Any = sys.modules["megatron.core"]
    state.get_tensor_model_parallel_group = lambda: group
    core.parallel_state = state


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    stand_in_for_megatron(group)
    from verl.utils.megatron.tensor_parallel import vocab_parallel_entropy

    import rloo_fast.integrations.verl as fast_verl

    fast_verl.patch()
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    hidden, weight, labels, g, gh = make_inputs()
    mine = weight.chunk(2)[rank]
    leaves = [x.clone().requires_grad_() for x in (hidden, mine)]
    logps, entropy = linear_cross_entropy(*leaves, labels, TEMPERATURE, "none", group)
    by_both = torch.autograd.grad((g * logps + gh * entropy).sum(), leaves, retain_graph=True)
    by_entropy = torch.autograd.grad((gh * entropy).sum(), leaves)

    theirs = [x.clone().requires_grad_() for x in (hidden, mine)]
    logits = theirs[0].reshape(14, 16) @ theirs[1].T / TEMPERATURE
    their_entropy = vocab_parallel_entropy(logits)
    theirs_by_entropy = torch.autograd.grad((gh * their_entropy).sum(), theirs)
    found = {
        "ours": [logps, entropy, *by_both],
        "ours, entropy": [entropy, *by_entropy],
        "verl, entropy": [their_entropy, *theirs_by_entropy],
    }
    Path(folder, str(rank)).write_text(
        json.dumps({name: [x.tolist() for x in xs] for name, xs in found.items()})
    )
    dist.barrier()
    dist.destroy_process_group()


def exact() -> list[Tensor]:
    """[log-probs, entropies, dX, dW] of the whole head in float64."""
    hidden, weight, labels, g, gh = make_inputs()
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    rows = leaves[0].reshape(14, 16)
    logps, entropy = plain_head(rows, leaves[1], labels.flatten(), temperature=TEMPERATURE)
    loss = (g * logps + gh * entropy).sum()
    return [x.detach() for x in (logps, entropy, *torch.autograd.grad(loss, leaves))]


if __name__ == "__main__":
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # verl compiles a product and a sum
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=rank_main, args=(rank, folder)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
            process.kill()
        print(json.dumps([json.loads(Path(folder, str(rank)).read_text()) for rank in range(2)]))
