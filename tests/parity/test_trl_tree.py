"""Tokens run for rows that share some, beside TRL 1.16's tree packing of the same samples.

`python -m tests.parity.test_trl_tree` prints the table: set -> tokens given, TRL's, ours; in one
row, and in rows of a budget as TRL's batcher and our planner make them.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from rloo_fast.batching.budget import TokenBudget
from rloo_fast.batching.layouts import LAYOUTS
from rloo_fast.batching.micro_batches import make_micro_batch
from rloo_fast.batching.planner import Planner, units_of
from tests.support.batches import generation_batch, tree_batch
from tests.support.tiny import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} w25 {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
SYSTEM = "w0 w1 w2 w3 w4 w5 w6 w7 w8 w9 " * 6


def conversations(seed: int, turns: int, num_groups: int = 6, k: int = 4):
    """Groups behind one system prompt: turns of user and assistant by a chat template,
    samples of a turn that go on with the next, as rows of their own as agents make them."""
    rng, tokenizer = random.Random(seed), make_tokenizer()
    say = lambda n: " ".join(f"w{rng.randrange(26)}" for _ in range(n))  # noqa: E731
    prompts, completions = [], []
    for _ in range(num_groups):
        shots = [{"role": "user", "content": say(20)}, {"role": "assistant", "content": say(9)}]
        messages = [{"role": "system", "content": SYSTEM}, *shots[: rng.choice([0, 2])]]
        for _ in range(turns):
            messages = [*messages, {"role": "user", "content": say(rng.randint(5, 30))}]
            ids = tokenizer.apply_chat_template(
                messages, chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False
            )
            opening = say(rng.randint(1, 6))  # samples of a model often begin alike
            answers = [f"{opening} {say(rng.randint(0, 40))}" for _ in range(k)]
            prompts += [ids] * k
            completions += [tokenizer(answer)["input_ids"] + [1] for answer in answers]
            messages = [*messages, {"role": "assistant", "content": rng.choice(answers)}]
    return generation_batch(prompts, completions, num_generations=k)


def random_rows(seed: int):
    """Prompts and completions of two tokens, so that rows meet and part everywhere."""
    rng = random.Random(seed)
    draw = lambda n: [rng.randint(4, 5) for _ in range(n)]  # noqa: E731
    prompts = [p for _ in range(6) for p in [draw(rng.randint(1, 12))] * 3]
    return generation_batch(prompts, [draw(rng.randint(1, 20)) for _ in prompts], num_generations=3)


SETS: dict[str, Callable[[int], object]] = {
    "random tries": lambda seed: tree_batch(seed, num_groups=8),
    "rows of two tokens": random_rows,
    "one turn": lambda seed: conversations(seed, 1),
    "six turns": lambda seed: conversations(seed, 6, num_groups=2),
}


def samples_of(batch):
    """Rows as TRL queues them."""
    found = []
    for row in range(batch.num_rows):
        prompt, completion = batch.prompt_ids[row], batch.completion_ids[row]
        ids = torch.tensor(prompt + completion)
        mask = torch.tensor([0] * len(prompt) + [1] * len(completion))
        found.append({"input_ids": ids, "completion_mask": mask, "group_id": batch.groups[row]})
    return found


def trl_tokens(batch) -> int:
    from trl.experimental.async_grpo.packing import TreeRow

    tree = TreeRow()
    for sample in samples_of(batch):
        tree.add(sample)
    return len(tree.tokens)


def our_tokens(batch) -> int:
    units = units_of(batch, range(batch.num_rows))
    cpu = torch.device("cpu")
    found = make_micro_batch(batch, units, LAYOUTS["shared_prefix"], device=cpu, pad_token_id=0)
    return found.input_ids.numel()


def trl_rows(batch, budget: int) -> list[int]:
    """Tokens of each row of TRL's batcher, for one process."""
    from trl.experimental.async_grpo.async_grpo_trainer import TokenBudgetBatcher

    batcher = TokenBudgetBatcher.__new__(TokenBudgetBatcher)
    last = {
        "input_ids": torch.full((budget,), 3),
        "completion_mask": torch.zeros(1),
        "group_id": -1,
    }
    batcher.dataset, batcher.metrics = (
        [*samples_of(batch), last],
        {},
    )  # one that closes the last row
    batcher.num_processes, batcher.token_budget = 1, budget
    rows = [row for (row,) in batcher]
    assert sum(len(row.samples) for row in rows) == batch.num_rows
    return [len(row.tokens) for row in rows]


def our_rows(batch, budget: int) -> list[int]:
    planner = Planner(TokenBudget(1, budget), device=torch.device("cpu"), pad_token_id=0)
    planner.layout_name = "shared_prefix"
    plans = planner.plan(batch, range(batch.num_rows), split=True)
    return [planner.micro_batch(batch, plan).input_ids.numel() for plan in plans]


@pytest.mark.parametrize("name", SETS)
def test_never_more_tokens_than_trls(name):
    for seed in range(40):
        batch = SETS[name](seed)
        assert our_tokens(batch) <= trl_tokens(batch), seed


def main() -> None:
    print(f"{'tokens of 40 sets':22}{'given':>9}{'TRL':>9}{'ours':>9}   in rows: TRL, ours")
    for name, make in SETS.items():
        batches = [make(seed) for seed in range(40)]
        lengths = [
            [len(p) + len(c) for p, c in zip(b.prompt_ids, b.completion_ids, strict=True)]
            for b in batches
        ]
        figures = [
            sum(map(sum, lengths)),
            *(sum(map(f, batches)) for f in (trl_tokens, our_tokens)),
        ]
        budgets = [2 * max(row) for row in lengths]
        rows = []
        for of in (trl_rows, our_rows):
            found = [of(b, budget) for b, budget in zip(batches, budgets, strict=True)]
            rows.append(f"{sum(map(sum, found))} in {sum(map(len, found))}")
        print(f"{name:22}" + "".join(f"{n:>9}" for n in figures) + "   " + ", ".join(rows))


if __name__ == "__main__":
    main()
