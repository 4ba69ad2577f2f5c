"""Three prompts and completions, functions with a fixed reward, and a small reward model."""

import math

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast as FastTokenizer

from rloo_fast.rewards import load_reward_functions

PROMPTS = ["one plus one", "two plus one", "one plus three"]
COMPLETIONS = ["two", "three", "four"]
IDS = [[1], [2, 2], [3, 3, 3]]
CHAT_PROMPTS = [[{"role": "user", "content": p}] for p in PROMPTS]
CHAT_COMPLETIONS = [[{"role": "assistant", "content": c}] for c in COMPLETIONS]
NAN = math.nan


def score(reward_funcs, columns=None, chat=False, log_extra=None, log_metric=None, **load):
    rewards = load_reward_functions(reward_funcs, **load)
    prompts, completions = (CHAT_PROMPTS, CHAT_COMPLETIONS) if chat else (PROMPTS, COMPLETIONS)
    try:
        return rewards(
            prompts,
            completions,
            IDS,
            columns or {},
            trainer_state="state",
            log_extra=log_extra,
            log_metric=log_metric,
        )
    finally:
        rewards.close()


def returns(value):
    def fixed(**kwargs):
        return value

    return fixed


def assert_same(rewards, expected):
    torch.testing.assert_close(rewards, torch.tensor(expected), equal_nan=True, rtol=0, atol=0)


SPECIAL = ["<unk>", "</s>", "<pad>", "user", "assistant", ":"]
WORDS = [*SPECIAL, *sorted(set(" ".join(PROMPTS + COMPLETIONS).split()))]
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"


def make_tokenizer(**special):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return FastTokenizer(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def make_model(num_labels=1, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=num_labels,
        attention_dropout=0.5,
    )
    return LlamaForSequenceClassification(config)
