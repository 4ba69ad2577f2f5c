"""The policy's log-probs and gradients against the model's own padded logits, per architecture."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from conftest import make_model

from rloo_fast.config import RLOOConfig
from rloo_fast.models import disable_dropout, has_dropout
from rloo_fast.policy import Policy, find_head, padded_batch, router_coef, run_inside
from rloo_fast.types import Samples

TINY = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GROUPED = {**TINY, "num_key_value_heads": 2, "head_dim": 8}


def qwen2_with_bias():
    model = make_model()
    model.lm_head = torch.nn.Linear(32, 32, bias=True)
    return model


def qwen2_with_lora_head():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(make_model(), LoraConfig(target_modules=["lm_head", "q_proj"], r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


MODELS = {
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TINY)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "qwen2 tied": lambda: make_model(tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED)),
    "gemma2 soft-cap, sliding window": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**GROUPED, sliding_window=4, final_logit_softcapping=0.3)
    ),
    "mistral sliding window": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**GROUPED, sliding_window=4)
    ),
    "granite logits_scaling": lambda: tf.GraniteForCausalLM(
        tf.GraniteConfig(**TINY, num_key_value_heads=2, logits_scaling=3.0)
    ),
    "cohere logit_scale": lambda: tf.CohereForCausalLM(
        tf.CohereConfig(**TINY, num_key_value_heads=2, logit_scale=0.25)
    ),
    "gpt2 learned positions": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=32, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "lm_head bias": qwen2_with_bias,
    "adapter on the lm_head": qwen2_with_lora_head,
}


def make_samples() -> Samples:
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: torch.randint(2, 32, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(n) for n in (3, 3, 9, 1)]
    completions = [draw(n) for n in (5, 1, 12, 7)]
    counted = torch.tensor([5, 1, 12, 0])  # the last row is masked
    return Samples(
        prompt_ids=prompts,
        completion_ids=completions,
        cu_seqlens=torch.cat([counted.new_zeros(1), counted.cumsum(0)]),
        scores=torch.zeros(4),
        num_generations=2,
    )


def by_own_logits(model, samples, temperature):
    """Log-probs of each completion from a forward of the row alone, by the model's own logits."""
    rows = []
    for r in range(samples.num_rows):
        prompt, completion = samples.prompt_ids[r], samples.completion_ids[r]
        n = int(samples.cu_seqlens[r + 1] - samples.cu_seqlens[r])
        ids = torch.tensor([prompt + completion])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : len(prompt) - 1 + n]
        logps = (logits / temperature).log_softmax(-1)
        rows.append(logps.gather(-1, ids[0, len(prompt) : len(prompt) + n, None])[:, 0])
    return torch.cat(rows)


@pytest.mark.parametrize("name", MODELS)
def test_logps_and_gradients_equal_the_models_own(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    disable_dropout(model)
    model.train()
    samples = make_samples()
    batch = padded_batch(samples, [0, 1, 2, 3], pad_token_id=0, pad_to_multiple_of=8)
    scores = Policy(model, temperature=0.7)(batch)
    reference = by_own_logits(model, samples, 0.7)
    assert (scores.logps - reference).abs().max() < 1e-5
    weights = torch.linspace(-1, 1, len(reference))
    wanted = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad((scores.logps * weights).sum(), wanted, allow_unused=True)
    theirs = torch.autograd.grad((reference * weights).sum(), wanted, allow_unused=True)
    largest = max(g.norm() for g in theirs if g is not None)
    for (parameter, _), a, b in zip(
        [x for x in model.named_parameters() if x[1].requires_grad], ours, theirs, strict=True
    ):
        assert (a is None) == (b is None), parameter
        if a is not None:
            assert (a - b).norm() <= 1e-4 * max(b.norm(), 1e-3 * largest), parameter


def test_a_plain_head_is_used_without_logits_and_an_adapted_one_is_not():
    assert find_head(make_model()).linear is not None
    assert find_head(qwen2_with_lora_head().get_base_model()).linear is None


def test_entropy_is_that_of_the_tempered_distribution():
    model, samples = make_model(), make_samples()
    batch = padded_batch(samples, [2], pad_token_id=0)
    entropy = Policy(model, temperature=2.0)(batch).entropy
    logits = model(input_ids=batch.input_ids).logits[0, 8:20] / 2.0
    assert torch.allclose(entropy, torch.distributions.Categorical(logits=logits).entropy())


def test_router_loss_is_the_models_own():
    torch.manual_seed(0)
    model = MODELS["mixtral"]()
    batch = padded_batch(make_samples(), [0, 2], pad_token_id=0)
    ours = Policy(model, temperature=1.0, aux_loss=True)(batch).aux_loss
    out = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True
    )
    assert torch.allclose(ours, out.aux_loss)
    assert router_coef(model, None) == model.config.router_aux_loss_coef
    with pytest.raises(ValueError, match="has no router"):
        router_coef(make_model(), 0.1)


def test_the_forward_goes_through_the_wrapper_and_leaves_no_trace():
    model = make_model()
    calls = []

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, *args, **kwargs):
            calls.append("wrapper")
            return self.module(*args, **kwargs)

    model.register_forward_hook(lambda *_: calls.append("hook"))
    assert run_inside(Wrapper(), model, lambda x: x + 1, 4) == 5
    assert calls == ["wrapper", "hook"]
    assert "forward" not in vars(model)


def test_dropout_is_found_and_put_off():
    model = make_model(attention_dropout=0.1)
    assert has_dropout(model)
    disable_dropout(model)
    assert not has_dropout(model)
    assert RLOOConfig("unused", disable_dropout=True).disable_dropout
