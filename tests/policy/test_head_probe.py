"""Whether log-probs come from the lm_head or from the model's own logits is found by trying."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from rloo_fast.policy import head_probe
from rloo_fast.policy.forward import Policy
from rloo_fast.policy.head_probe import why_own_logits
from tests.policy.test_forward import MODELS, PADDED_ONLY, TINY, by_own_logits, make_batch
from tests.policy.test_forward import micro_batch as make_micro_batch
from tests.support.tiny import make_model

DECODER = {**TINY, "is_decoder": True}
TRANSFORMED = "what reaches its lm_head is not the backbone's last hidden state"
OTHERWISE = "its logits are not the lm_head's with the scale and soft-cap its config declares"


def granite_like(name, value):
    """A model that scales its logits by a number that no config names as we know it."""
    model = make_model()
    head = model.lm_head
    model.lm_head = torch.nn.Linear(32, 32, bias=False)
    model.lm_head.weight = head.weight
    setattr(model.config, name, value)
    own = model.forward

    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits * value
        return out

    model.forward = forward
    return model


OTHER_HEADS = {
    "modernbert decoder": (
        lambda: tf.ModernBertDecoderForCausalLM(
            tf.ModernBertDecoderConfig(**TINY, cls_token_id=2, sep_token_id=3)
        ),
        TRANSFORMED,
    ),
    "roberta": (lambda: tf.RobertaForCausalLM(tf.RobertaConfig(**DECODER)), TRANSFORMED),
    "bert": (lambda: tf.BertLMHeadModel(tf.BertConfig(**DECODER)), TRANSFORMED),
    "electra": (
        lambda: tf.ElectraForCausalLM(tf.ElectraConfig(**DECODER, embedding_size=32)),
        TRANSFORMED,
    ),
    "a multiplier of another name": (lambda: granite_like("mup_head", 0.3), OTHERWISE),
}
PLAIN_HEADS = {
    "recurrent gemma: a cap of its own name": lambda: tf.RecurrentGemmaForCausalLM(
        tf.RecurrentGemmaConfig(
            **TINY, lru_width=32, num_key_value_heads=1, logits_soft_cap=2.0
        )
    ),
    "xlstm: a cap of its own name": lambda: tf.xLSTMForCausalLM(
        tf.xLSTMConfig(
            vocab_size=32, hidden_size=32, embedding_dim=32, num_hidden_layers=2, num_blocks=2,
            num_heads=4, output_logit_soft_cap=2.0, use_cache=False,
        )
    ),
    "opt: runs its decoder by itself": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=32, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.2, dropout=0.0,
        )
    ),
    "falcon h1: multipliers": lambda: tf.FalconH1ForCausalLM(
        tf.FalconH1Config(
            **TINY, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
            mamba_d_state=8, mamba_n_groups=1, lm_head_multiplier=0.25,
        )
    ),
}  # fmt: skip


@pytest.fixture(params=["whole", "split"])
def whole_or_split(request, monkeypatch):
    """Without its weights a model is tried without its backbone."""
    if request.param == "split":
        monkeypatch.setattr(head_probe, "holds_whole_weights", lambda _: False)


def logps_are_the_models_own(model):
    batch = make_batch()
    model.eval()
    with torch.no_grad():
        ours = Policy(model, temperature=0.7).logps(make_micro_batch("padded", batch)).logps
        return torch.allclose(ours, by_own_logits(model, batch, 0.7), atol=1e-5)


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_a_model_with_another_head_gives_its_own_logits(name, whole_or_split):
    torch.manual_seed(0)
    make, why = OTHER_HEADS[name]
    model = make()
    assert why_own_logits(model) == why
    assert logps_are_the_models_own(model)


@pytest.mark.parametrize("name", PLAIN_HEADS)
def test_a_head_that_does_what_is_declared_makes_no_logits(name, whole_or_split):
    torch.manual_seed(0)
    model = PLAIN_HEADS[name]()
    assert why_own_logits(model) is None
    assert logps_are_the_models_own(model)


@pytest.mark.parametrize(
    "name", sorted(set(MODELS) - PADDED_ONLY - {"LoRA", "LoRA on the lm_head"})
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_count_as_another_head(name, dtype, whole_or_split):
    torch.manual_seed(0)
    assert why_own_logits(MODELS[name]().to(dtype)) is None


def test_a_small_soft_cap_of_another_name_is_found_in_bf16(monkeypatch):
    """30 bends logits of a new model by less than their rounding."""
    model = MODELS["gemma2: soft-caps, sliding window"]()
    model.config.final_logit_softcapping = 30.0
    assert why_own_logits(model.bfloat16()) is None
    own = head_probe.find_head
    monkeypatch.setattr(head_probe, "find_head", lambda m: own(m)._replace(softcap=None))
    assert why_own_logits(model) == OTHERWISE


def test_a_backbone_that_needs_more_than_ids_is_left_to_the_model(monkeypatch):
    model = make_model()
    backbone = model.model.forward

    def forward(*args, use_cache=None, logits=None, **kwargs):
        if "position_ids" not in kwargs and "attention_mask" not in kwargs:
            raise KeyError("where is the mask?")
        return backbone(*args, use_cache=use_cache, **kwargs)

    monkeypatch.setattr(model.model, "forward", forward)
    assert "cannot be run by itself (KeyError" in why_own_logits(model)


def test_the_trial_leaves_no_trace():
    model = make_model().train()
    why_own_logits(model)
    assert model.training
    assert "forward" not in vars(model.lm_head)
    assert "forward" not in vars(model.model)
