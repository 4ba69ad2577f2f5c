"""Dropout wherever a model keeps its rate: put off, and found by two forwards in train mode."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import LoHaConfig, LoraConfig, get_peft_model

from rloo_fast.models.dropout import disable_dropout, has_dropout, has_dropout_rates
from tests.support.tiny import make_model

SIZES = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
NONE = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}


def opt(**rates):
    return tf.OPTForCausalLM(
        tf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, **{**NONE, **rates})
    )


def xglm():
    config = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}
    return tf.XGLMForCausalLM(tf.XGLMConfig(vocab_size=32, **config))


def phimoe():
    """Its router's jitter is noise in train mode, and no dropout."""
    return tf.PhimoeForCausalLM(
        tf.PhimoeConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=4)
    )


class ReadsItsConfig(torch.nn.Module):
    def __init__(self, layer, config):
        super().__init__()
        self.layer, self.config = layer, config

    def forward(self, *args, **kwargs):
        rate = self.config.hidden_dropout
        return torch.nn.functional.dropout(self.layer(*args, **kwargs), rate, self.training)


def by_config():
    model = make_model()
    model.config.hidden_dropout = 0.2
    model.lm_head = ReadsItsConfig(model.lm_head, model.config)
    return model


DROPPING = {
    "OPT": lambda: opt(dropout=0.1),
    "OPT: attention": lambda: opt(attention_dropout=0.1),
    "OPT: layerdrop": lambda: opt(layerdrop=0.5),
    "XGLM": xglm,
    "BioGPT": lambda: tf.BioGptForCausalLM(tf.BioGptConfig(**SIZES, intermediate_size=48)),
    "GPT-2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4)
    ),
    "Qwen2: attention": lambda: make_model(attention_dropout=0.5),
    "read from the config at each call": by_config,
    "LoRA": lambda: get_peft_model(make_model(), LoraConfig(r=2, lora_dropout=0.3)),
    "LoHa: dropout of whole modules": lambda: get_peft_model(
        make_model(), LoHaConfig(r=2, module_dropout=0.5, target_modules=["q_proj"])
    ),
}


def train_mode_logits(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model.train()(input_ids=torch.arange(2, 32)[None]).logits


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_found_and_put_off_wherever_its_rate_is_kept(name):
    torch.manual_seed(0)
    model = DROPPING[name]().eval()
    assert has_dropout(model)
    assert not model.training  # as it was before the trial
    disable_dropout(model)
    assert not has_dropout(model)
    assert torch.equal(train_mode_logits(model, 1), train_mode_logits(model, 2))


def test_random_numbers_that_change_nothing_are_no_dropout():
    """OPT draws one per layer for layerdrop=0."""
    assert not has_dropout(opt())


def test_noise_that_is_no_dropout_counts_as_such(caplog):
    torch.manual_seed(0)
    model = phimoe()
    assert not has_dropout_rates(model)
    disable_dropout(model)
    assert has_dropout(model)
    assert "although no module has a dropout rate" in caplog.text


def test_a_trial_leaves_random_state_and_modes_alone():
    model = opt(dropout=0.1)
    model.eval()
    model.lm_head.train()
    state = torch.get_rng_state()
    disable_dropout(model)
    has_dropout(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.lm_head.training
    assert not model.training


def test_the_config_is_left_as_it_is_where_modules_suffice():
    """It is saved with the model."""
    model = opt(dropout=0.1)
    disable_dropout(model)
    assert model.config.dropout == 0.1


def test_weights_that_are_not_here_are_not_run():
    with torch.device("meta"):
        model, plain = opt(dropout=0.1), opt()
    assert has_dropout(model)
    assert not has_dropout(plain)
