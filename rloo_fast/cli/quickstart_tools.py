"""The quickstart's variant `tools`: a model of a million parameters learns to use a calculator.

It is asked for a product such as 37*84, which it cannot compute. Its warm start shows it each
product twice: with a call of the tool `calculator`, whose answer it repeats, and, as often, with a
number of the right length that it makes up. RLOO then has to find out from the reward alone (is the
answer right?) that calling pays.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .warm_start import EOS, NOT_LEARNED, PAD

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

TASK = "product"
TOOL = "calculator"
NUM_HELDOUT, NUM_RLOO, NUM_DEMONSTRATED = 300, 1000, 4000  # products, none in two of them
WARM_START_STEPS, BATCH_SIZE = 450, 32
LONGEST = 64  # tokens of the model's context
# a call is <tool_call>{"name": ..., "arguments": {...}}</tool_call>, as Qwen writes it
CHAT_TEMPLATE = (
    "{% if tools %}<|tools|>{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}" + EOS + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# what every conversation has is a token each, so that a step is a matter of seconds
WORDS = (
    f"<|tools|>{TOOL}",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    '<tool_call>{"name": "' + TOOL + '", "arguments": {"expression": "',
    '"}}</tool_call>',
)


def make_problems(seed: int) -> tuple[Dataset, Dataset, Dataset]:
    """(held-out, RLOO's, demonstrated) products: rows of a conversation and its answer."""
    from datasets import Dataset

    draw = random.Random(seed)
    pairs: dict[tuple[int, int], None] = {}
    sizes = (NUM_HELDOUT, NUM_RLOO, NUM_DEMONSTRATED)
    while len(pairs) < sum(sizes):
        pairs[draw.randint(11, 99), draw.randint(11, 99)] = None
    rows = [
        {"prompt": [{"role": "user", "content": f"{a}*{b}"}], "answer": str(a * b)}
        for a, b in pairs
    ]
    ends = [sum(sizes[: i + 1]) for i in range(3)]
    parts = [rows[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    heldout, train, demonstrated = map(Dataset.from_list, parts)
    return heldout, train, demonstrated


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2's tokenizer: the bytes, a token for each of WORDS, and a chat template for tools."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    symbols = [PAD, EOS, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: number for number, symbol in enumerate(symbols)},
        merges=[],
        unk_token=EOS,  # never needed: every byte has its token
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
    )
    added: Any = [AddedToken(word, normalized=False) for word in WORDS]
    tokenizer.add_tokens(added)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_demonstrations(
    problems: Dataset, tokenizer: PreTrainedTokenizerFast, seed: int
) -> list[dict[str, list[int]]]:
    """Two rows per problem, of one length and shuffled: with a call of the tool, and with a number
    made up. Labels on what the model is to write, which the tool's answer is not."""
    from ..tools.calculator import calculator
    from ..tools.functions import Tool

    draw, schemas = random.Random(seed), [Tool.of(calculator).schema]
    rows = []
    for prompt, answer in zip(problems["prompt"], problems["answer"], strict=True):
        expression = prompt[0]["content"]
        call = {"name": TOOL, "arguments": {"expression": expression}}
        called = [
            {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
            {"role": "tool", "content": calculator(expression)},
            {"role": "assistant", "content": answer},
        ]
        made_up = [{"role": "assistant", "content": made_up_number(answer, draw)}]
        for messages in (called, made_up):
            rows.append(_row([*prompt, *messages], tokenizer, schemas))
    longest = max(len(row["input_ids"]) for row in rows)
    for row in rows:
        missing = longest - len(row["input_ids"])
        row["input_ids"] += [tokenizer.pad_token_id] * missing
        row["labels"] += [NOT_LEARNED] * missing
    draw.shuffle(rows)
    return rows


def made_up_number(answer: str, draw: random.Random) -> str:
    """As many digits, and another number."""
    low = 10 ** (len(answer) - 1)
    while (number := str(draw.randrange(low, 10 * low))) == answer:
        pass
    return number


def _row(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, schemas: list[Any]
) -> dict[str, list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for number, message in enumerate(messages, 1):
        text: Any = tokenizer.apply_chat_template(messages[:number], tools=schemas, tokenize=False)
        own = message["role"] == "assistant"
        new = tokenizer(text).input_ids[len(ids) :]
        ids += new
        # what the model writes: not the first token, which opens its turn
        labels += [NOT_LEARNED, *new[1:]] if own else [NOT_LEARNED] * len(new)
    return {"input_ids": ids, "labels": labels}


def show(found: dict[str, float], num_heldout: int) -> None:
    """Print what `measured` has found."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"On {num_heldout} held-out products", min_width=36)
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for what, name in (("right answers", "accuracy"), ("calls of the calculator", "calls")):
        before, after = found[f"{name}_before"], found[f"{name}_after"]
        table.add_row(what, f"{before:.3f}", f"{after:.3f}")
    Console().print(table)


def measured(run_dir: Path) -> dict[str, float]:
    """Share of held-out products that were right, and calls per answer, before and after; sampled
    at the training temperature."""
    from ..reports.metrics_file import read_metrics

    evaluations = [row for row in read_metrics(run_dir) if "eval_reward" in row]
    first, last = evaluations[0], evaluations[-1]
    return {
        "accuracy_before": first["eval_reward"],
        "accuracy_after": last["eval_reward"],
        "calls_before": first["eval_tools/call_frequency"],
        "calls_after": last["eval_tools/call_frequency"],
    }
