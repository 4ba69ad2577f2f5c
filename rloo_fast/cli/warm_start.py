"""The quickstart's warm start: a small Qwen2 taught by demonstrations of which half are wrong.

A model that comes out of pre-training can do a task without doing it reliably. The quickstart makes
one such in a minute: each word is demonstrated twice, spelled backward (right) and copied forward
(wrong), and nothing says which is which. The model learns both and puts about half of its
probability on each; the reward then has to teach it to do what the prompt asks.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

WRONG_SHARE = 0.5  # of the demonstrations, exactly: one right and one wrong per problem
PAD, EOS = "<|pad|>", "<|endoftext|>"
NOT_LEARNED = -100  # label that the cross-entropy skips


def build_tokenizer(problems: Dataset) -> PreTrainedTokenizerFast:
    """Qwen2's tokenizer: the bytes, and one token for what all questions begin with.

    Raises ValueError if the questions begin with nothing in common.
    """
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    prompts = problems["prompt"][:]
    beginning = os.path.commonprefix(prompts)  # noqa: RUF071 (characters are meant)
    if not beginning or beginning in prompts:
        raise ValueError(
            "The questions must begin alike and then differ, "
            f"got {prompts[0]!r} and {prompts[-1]!r}."
        )
    symbols = [PAD, EOS, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: number for number, symbol in enumerate(symbols)},
        merges=[],
        unk_token=EOS,  # never needed: every byte has its token
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
    )
    added: Any = AddedToken(beginning, normalized=False)
    tokenizer.add_tokens([added])
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A Qwen2 of 1.04M parameters with random weights: 2 layers, hidden size 192."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

    set_seed(seed)
    ends: dict[str, Any] = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        **ends,
    )
    return Qwen2ForCausalLM(config)


def make_demonstrations(problems: Dataset, seed: int) -> list[tuple[str, str]]:
    """(prompt, completion) twice per problem: its answer, and the word as it was given; shuffled.

    The wrong one is wrong for every problem: raises ValueError for a word that reads the same both
    ways (capitals count as small letters, as they do for the verifier).
    """
    demonstrations = []
    for prompt, answer in zip(problems["prompt"], problems["answer"], strict=True):
        copied = answer[::-1]
        if copied.lower() == answer.lower():
            raise ValueError(f"{answer!r} is a palindrome: leave {prompt!r} out.")
        demonstrations += [(prompt, answer), (prompt, copied)]
    random.Random(seed).shuffle(demonstrations)
    return demonstrations


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    demonstrations: Sequence[tuple[str, str]],
    output_dir: Path,
    **options: Any,
) -> float:
    """`teach` these (prompt, completion)."""
    return teach(model, tokenizer, encode(demonstrations, tokenizer), output_dir, **options)


def teach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, list[int]]],
    output_dir: Path,
    *,
    max_steps: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> float:
    """-mean over the tokens with labels of log p, minimised by transformers' Trainer.

    Trains `model` in place, saves it with its tokenizer to `output_dir`; returns the mean loss.
    """
    from transformers import Trainer, TrainingArguments, default_data_collator

    from ..reports.progress import show_lines

    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, max_steps // 10),
        adam_beta2=0.99,
        weight_decay=0.01,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        use_cpu=True,  # the same run wherever it is made
        dataloader_pin_memory=False,
        seed=seed,
    )
    dataset: Any = rows  # a list is all that a Trainer needs
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=default_data_collator,
    )
    show_lines(trainer)
    loss = trainer.train().training_loss
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return loss


def encode(
    demonstrations: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast
) -> list[dict[str, list[int]]]:
    """Rows of one length: prompt | completion | EOS | padding; labels on completion and EOS only.

    Padding comes last, where no other token attends to it, so there is no attention mask.
    """
    prompts = tokenizer([prompt for prompt, _ in demonstrations]).input_ids
    completions = tokenizer([text + EOS for _, text in demonstrations]).input_ids
    longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int), pad
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        num_pads = longest - len(prompt) - len(completion)
        labels = [NOT_LEARNED] * len(prompt) + completion + [NOT_LEARNED] * num_pads
        rows.append({"input_ids": prompt + completion + [pad] * num_pads, "labels": labels})
    return rows
