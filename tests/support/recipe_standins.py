"""Stand-ins for the recipes' models and data sets: same architectures and columns, made in seconds.

Every policy is taught by demonstrations of which half are wrong, and none says which; its reward
(a classifier trained here, or the tests of a program) prefers the other half.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rloo_fast.data.row_functions import mbpp_chat

EOS = "<|endoftext|>"
CHAT_TEMPLATE = (  # SmolLM2's form of it
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' "
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# --- making


def byte_pair_tokenizer(texts: Iterable[str], **special: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the texts, as GPT-NeoX's: an EOS token, no pad token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    core.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS, *special.values()],
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": EOS, **special})


def neox_config(tokenizer: PreTrainedTokenizerFast, **more: Any) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256, rotary_pct=0.25, bos_token_id=0,
        eos_token_id=0, **more,
    )  # fmt: skip


def teach(
    model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]], steps: int, lr: float = 3e-3
) -> None:
    """Minimise the cross-entropy of each completion after its prompt."""
    rows = [[tokenizer(text)["input_ids"] for text in pair] for pair in texts]
    encoded = [(prompt + rest, [-100] * len(prompt) + rest) for prompt, rest in rows]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    order = random.Random(0)
    model.train()
    for step in range(steps):
        ids, labels = zip(*order.sample(encoded, min(32, len(encoded))), strict=True)
        loss = model(input_ids=padded(ids, 0), labels=padded(labels, -100)).loss
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """On the right, where causal attention does not see it."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def saved(path: Path, model: Any, tokenizer: Any) -> str:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


# --- TL;DR: posts, a policy that may summarise or ramble, a reward model read at EOS

PETS = ("cat", "dog", "horse", "parrot", "rabbit", "goat", "duck", "snake")
DEEDS = ("ate my lunch", "ran away", "broke a window", "slept all day", "bit a friend")
RAMBLING = (" well it is a long story", " i do not know what to say")


def tldr_rows() -> list[dict[str, str]]:
    """The columns of trl-lib/tldr; a few posts are too long for the recipe's limit here."""
    rows = []
    for number, (pet, deed) in enumerate((p, d) for p in PETS for d in DEEDS):
        post = f"Today my {pet} {deed}. " * (9 if number % 10 == 9 else 1)
        prompt = f"SUBREDDIT: r/pets\n\nTITLE: My {pet}\n\nPOST: {post.strip()}\n\nTL;DR:"
        rows.append({"prompt": prompt, "completion": f" my {pet} {deed}"})
    return rows


def make_tldr(path: Path) -> dict[str, str]:
    """Directories of policy (sft), reward model and a tokenizer alone, and the file of posts."""
    torch.manual_seed(0)
    rows = tldr_rows()
    texts = [row["prompt"] + row["completion"] for row in rows]
    tokenizer = byte_pair_tokenizer([*texts, *RAMBLING])
    pairs = [(row["prompt"], row["completion"], RAMBLING[i % 2]) for i, row in enumerate(rows)]
    short = [(prompt, text + EOS) for prompt, *both in pairs for text in both if len(prompt) < 200]
    policy = GPTNeoXForCausalLM(neox_config(tokenizer))
    teach(policy, tokenizer, short, steps=120)
    reward = GPTNeoXForSequenceClassification(neox_config(tokenizer, num_labels=1))
    teach_reward(reward, tokenizer, pairs, steps=40)
    tokenizer.save_pretrained(path / "tokenizer")
    return {
        "tokenizer": str(path / "tokenizer"),
        "sft": saved(path / "sft", policy, tokenizer),
        "reward": saved(path / "reward", reward, tokenizer),
        "data": write_rows(path / "tldr.jsonl", rows),
    }


def teach_reward(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str, str]], steps: int
) -> None:
    """Log-sigmoid of the difference of the values read at the EOS token of good and bad."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    order = random.Random(0)
    for _ in range(steps):
        drawn = order.sample(list(pairs), 16)
        texts = [prompt + text + EOS for prompt, *both in drawn for text in both]
        rows = tokenizer(texts)["input_ids"]
        hidden = model.gpt_neox(input_ids=padded(rows, 0)).last_hidden_state
        last = hidden[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
        good, bad = model.score(last).view(-1, 2).unbind(1)
        loss = -torch.nn.functional.logsigmoid(good - bad).mean()
        optimizer.zero_grad()
        (loss + 0.05 * (good + bad).mean() ** 2).backward()
        optimizer.step()


# --- sentiment: reviews, a policy with a LoRA adapter that continues them, a classifier

SUBJECTS = ("film", "movie", "plot", "acting", "ending", "music")
WORDS = {  # label of imdb: how such a review goes on
    0: ("dull and bad", "a waste of time", "awful from start to end"),
    1: ("great and moving", "a joy to watch", "lovely from start to end"),
}


def imdb_rows() -> list[dict[str, Any]]:
    """The columns of imdb, negative reviews first, as there."""
    rows = []
    for label, ends in WORDS.items():
        for number in range(60):
            subject, other = SUBJECTS[number % 6], SUBJECTS[(number // 6) % 6]
            text = f"The {subject} that I saw is {ends[number % 3]} and the {other} {ends[0]}."
            rows.append({"text": text, "label": label})
    return rows


def make_sentiment(path: Path) -> dict[str, str]:
    """Directories of base policy, its adapter and the classifier, and the file of reviews."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    rows = imdb_rows()
    tokenizer = byte_pair_tokenizer(row["text"] for row in rows)
    begun = [row["text"].split(" ", 5) for row in rows]
    pairs = [(" ".join(words[:5]), " " + words[5] + EOS) for words in begun]
    base = GPTNeoXForCausalLM(neox_config(tokenizer))
    teach(base, tokenizer, pairs[:60], steps=100)  # negative ones only; the adapter learns of both
    saved(path / "base", base, tokenizer)
    lora = LoraConfig(
        r=8, lora_alpha=16, task_type="CAUSAL_LM",
        target_modules=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    )  # fmt: skip
    adapted = get_peft_model(base, lora)  # pyright: ignore
    teach(adapted, tokenizer, pairs, steps=80, lr=1e-2)
    adapted.save_pretrained(str(path / "adapter"))
    return {
        "base": str(path / "base"),
        "adapter": str(path / "adapter"),
        "reward": make_classifier(path / "classifier", rows),
        "data": write_rows(path / "imdb.jsonl", rows),
    }


def make_classifier(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """A DistilBERT with the labels of lvwerra/distilbert-imdb, trained on texts cut anywhere."""
    words = sorted({word for row in rows for word in row["text"].replace(".", " .").split()})
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    vocabulary = {word: number for number, word in enumerate([*special.values(), *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    core.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=512, **special,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    config = DistilBertConfig(
        vocab_size=len(vocabulary), dim=32, hidden_dim=64, n_layers=1, n_heads=2,
        id2label=labels, label2id={name: number for number, name in labels.items()},
    )  # fmt: skip
    model = DistilBertForSequenceClassification(config)
    optimizer, order = torch.optim.AdamW(model.parameters(), 3e-3), random.Random(0)
    for _ in range(60):
        drawn = order.sample(list(rows), 16)
        texts = [" ".join(row["text"].split()[: order.randint(7, 14)]) for row in drawn]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor([row["label"] for row in drawn])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return saved(path, model.eval(), tokenizer)


# --- code: tasks with tests, and a chat model that writes right and wrong programs

TASKS = {  # name of the function: what it does, its body, two tests; a wrong body returns x itself
    "double": ("doubles a number", "x + x", ("double(3) == 6", "double(0) == 0")),
    "square": ("squares a number", "x * x", ("square(3) == 9", "square(2) == 4")),
    "half": ("halves an even number", "x // 2", ("half(4) == 2", "half(10) == 5")),
    "first": ("gives the first item of a list", "x[0]", ("first([1]) == 1", "first([2, 3]) == 2")),
}


def mbpp_rows() -> list[dict[str, Any]]:
    """The columns of mbpp (full)."""
    return [
        {
            "task_id": number,
            "text": f"Write a function that {what}.",
            "code": f"def {name}(x):\n    return {right}",
            "test_list": [f"assert {test}" for test in tests],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for number, (name, (what, right, tests)) in enumerate(TASKS.items())
    ]


def make_mbpp(path: Path) -> dict[str, str]:
    """Directory of the chat model, and the file of tasks."""
    torch.manual_seed(0)
    rows = mbpp_rows()
    chat = {"bos_token": "<|im_start|>", "pad_token": "<|im_end|>"}
    programs = [
        f"```python\ndef {name}(x):\n    return {body}\n```"
        for name, (_, right, _) in TASKS.items()
        for body in (right, "x")
    ]
    prompts = [mbpp_chat(row)["prompt"] for row in rows]
    corpus = [*programs, *[prompt[0]["content"] for prompt in prompts]] * 4
    tokenizer = byte_pair_tokenizer([*corpus, "user\nassistant\n"], **chat)
    tokenizer.chat_template = CHAT_TEMPLATE
    texts = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    pairs = [(texts[number // 2], program + EOS) for number, program in enumerate(programs)]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=0, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    teach(model, tokenizer, pairs, steps=220)
    return {
        "model": saved(path / "model", model, tokenizer),
        "data": write_rows(path / "mbpp.jsonl", rows * 8),
    }
