"""Log-probs and gradients of each layout against the model's own logits of each row, per
architecture.

`python -m tests.policy.test_forward` prints the table: largest difference of a log-prob,
largest relative difference of a parameter's gradient, and what layout "auto" takes and why.
"""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from accelerate import Accelerator

from rloo_fast.batching.layouts import LAYOUTS
from rloo_fast.batching.micro_batches import make_micro_batch
from rloo_fast.config.rloo_config import RLOOConfig
from rloo_fast.distributed.inside_forward import run_inside
from rloo_fast.models.dropout import disable_dropout, has_dropout
from rloo_fast.policy.forward import Policy
from rloo_fast.policy.head import find_head
from rloo_fast.policy.layout_probe import choose_layout
from rloo_fast.policy.router import router_coef
from rloo_fast.records import GenerationBatch, LossInputs
from tests.support.batches import generation_batch, tree_batch
from tests.support.tiny import make_model

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
    "initializer_range": 0.2,
}
GROUPED = {**TINY, "num_key_value_heads": 2, "head_dim": 8}


def qwen2_with_bias():
    model = make_model()
    model.lm_head = torch.nn.Linear(32, 32, bias=True)
    return model


def with_lora(**settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(make_model(), LoraConfig(r=4, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def qwen2_with_lora_head():
    return with_lora(target_modules=["lm_head", "q_proj"])


def gemma2():
    config = tf.Gemma2Config(
        **GROUPED, sliding_window=4, final_logit_softcapping=0.3, attn_logit_softcapping=0.5
    )
    model = tf.Gemma2ForCausalLM(config)
    model.set_attn_implementation("eager")  # transformers 5.17: its SDPA leaves the soft-cap out
    return model


def gemma3():
    config = tf.Gemma3TextConfig(
        **GROUPED, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    )
    return tf.Gemma3ForCausalLM(config)


MODELS = {
    "gpt_neox (pythia)": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TINY)),
    "llama, tied (SmolLM2)": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**GROUPED, tie_word_embeddings=True)
    ),
    "qwen2": make_model,
    "qwen2 tied": lambda: make_model(tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED)),
    "gemma2: soft-caps, sliding window": gemma2,
    "gemma3: sliding window": gemma3,
    "mistral: sliding window": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**GROUPED, sliding_window=4)
    ),
    "granite: logits_scaling": lambda: tf.GraniteForCausalLM(
        tf.GraniteConfig(**TINY, num_key_value_heads=2, logits_scaling=3.0)
    ),
    "cohere: logit_scale": lambda: tf.CohereForCausalLM(
        tf.CohereConfig(**TINY, num_key_value_heads=2, logit_scale=0.25)
    ),
    "gpt2: learned positions": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=32, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
        )
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "lm_head bias": qwen2_with_bias,
    "LoRA": lambda: with_lora(target_modules=["q_proj", "down_proj"]),
    "LoRA on the lm_head": qwen2_with_lora_head,
    "gptj: attention of its own": lambda: tf.GPTJForCausalLM(
        tf.GPTJConfig(
            vocab_size=32, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=8,
            initializer_range=0.2,
        )
    ),
    "mamba: no attention": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "gpt_oss: attention sinks": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **GROUPED, sliding_window=4, num_local_experts=4, num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}  # fmt: skip
PADDED_ONLY = {"mamba: no attention", "gpt_oss: attention sinks"}
if not tf.GPTJForCausalLM._supports_attention_backend:  # newer transformers dispatch it
    PADDED_ONLY.add("gptj: attention of its own")
CASES = [
    (name, layout)
    for name in MODELS
    for layout in LAYOUTS
    if layout == "padded" or name not in PADDED_ONLY
]


def make_batch() -> GenerationBatch:
    """Three groups: completions of 5, 1 and 12 tokens; of 0 tokens, and of 7, masked; of 3."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: torch.randint(2, 32, (n,), generator=generator).tolist()  # noqa: E731
    three, one, nine = draw(3), draw(1), draw(9)
    return generation_batch(
        prompt_ids=[three, three, three, one, one, nine],
        completion_ids=[draw(n) for n in (5, 1, 12, 0, 7, 3)],
        num_tokens=[5, 1, 12, 0, 0, 3],
        groups=[0, 0, 0, 1, 1, 2],
        whole_groups=False,
    )


TREE = tree_batch(25, num_groups=8)  # see test_the_tree_is_deep


def units_of(batch):
    return [[r for r in range(batch.num_rows) if batch.groups[r] == g] for g in {*batch.groups}]


def micro_batch(layout, batch=None, units=None, **options):
    settings = {"device": torch.device("cpu"), "pad_token_id": 0, **options}
    batch = batch or make_batch()
    return make_micro_batch(batch, units or units_of(batch), LAYOUTS[layout], **settings)


def by_own_logits(model, batch, temperature):
    """Log-probs of each counted token from a forward of its strand alone, by the model's own
    logits."""
    found = []
    for r in range(batch.num_rows):
        for strand, counted in batch.strands(r):
            ids = torch.tensor([batch.prompt_ids[r] + strand])
            places = len(batch.prompt_ids[r]) + torch.tensor([*counted], dtype=torch.long)
            logps = (model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
            found.append(logps[places - 1].gather(-1, ids[0, places, None])[:, 0])
    return torch.cat(found)


def built(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    disable_dropout(model)
    return model.train()


def differences(model, layout, batch=None):
    """(largest difference of a log-prob, largest relative difference of a parameter's gradient),
    the training loss' forward and the no-grad forward together."""
    batch, policy = batch or make_batch(), Policy(model, temperature=0.7)
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    reference = by_own_logits(model, batch, 0.7)
    advantages = torch.linspace(-1, 1, len(reference))
    theirs = torch.autograd.grad(
        -(reference * advantages).sum(), wanted.values(), allow_unused=True
    )
    batch = micro_batch(layout, batch)
    objective, _ = policy.loss(
        batch, LossInputs(token_advantages=advantages), {"denominator": 1, "level": "token"}
    )
    ours = torch.autograd.grad(objective.loss, wanted.values(), allow_unused=True)
    with torch.no_grad():
        scores = policy.logps(batch)
    logp = max((x - reference).abs().max().item() for x in (objective.logps, scores.logps))
    largest = max(g.norm() for g in theirs if g is not None)
    worst = 0.0
    for name, a, b in zip(wanted, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            worst = max(worst, ((a - b).norm() / max(b.norm(), 1e-3 * largest)).item())
    return logp, worst


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logps_and_gradients_equal_the_models_own(name, layout):
    logp, gradient = differences(built(name), layout)
    assert logp < 1e-5
    assert gradient < 1e-4


@pytest.mark.parametrize("name", [name for name in MODELS if name not in PADDED_ONLY])
def test_a_tree_is_each_row_run_alone(name):
    logp, gradient = differences(built(name), "shared_prefix", TREE)
    assert logp < 1e-5
    assert gradient < 1e-4


def test_the_tree_is_deep():
    batch = micro_batch("shared_prefix", TREE)
    depths = [0]
    for parent in batch.segments.parents.tolist():
        depths.append(1 + depths[parent + 1])
    assert max(depths) == 7
    assert batch.input_ids.numel() < 0.6 * micro_batch("packed", TREE).input_ids.numel()


@pytest.mark.parametrize("name", MODELS)
def test_auto_takes_the_shared_prefix_wherever_it_is_exact(name):
    model = built(name)
    layout, why = choose_layout("auto", Policy(model, temperature=1.0), model, Accelerator())
    assert layout == ("padded" if name in PADDED_ONLY else "shared_prefix")
    assert layout == "shared_prefix" or "cannot be used, as" in why
    assert model.training


def test_a_layout_asked_for_that_the_model_cannot_do_is_refused():
    model = built("mamba: no attention")
    with pytest.raises(ValueError, match='layout="packed" cannot be used with MambaForCausalLM'):
        choose_layout("packed", Policy(model, temperature=1.0), model, Accelerator())


def test_a_model_that_only_claims_to_support_it_is_found_out(monkeypatch):
    """Positions that do not restart: declared support, wrong log-probs."""
    model = built("gpt2: learned positions")
    assert LAYOUTS["shared_prefix"].refusal(model) is None
    forward = model.base_model.forward
    monkeypatch.setattr(
        model.base_model, "forward", lambda position_ids=None, **kwargs: forward(**kwargs)
    )
    layout, why = choose_layout("auto", Policy(model, temperature=1.0), model, Accelerator())
    assert layout == "padded"
    assert "in a trial run its log-probs were off by" in why


@pytest.mark.parametrize("ignores_positions", [False, True])
def test_the_trial_run_tells_rounding_from_mixing_up_in_bf16(ignores_positions, monkeypatch):
    model = built("gpt2: learned positions").bfloat16()
    if ignores_positions:
        forward = model.base_model.forward
        monkeypatch.setattr(
            model.base_model, "forward", lambda position_ids=None, **kwargs: forward(**kwargs)
        )
    layout, _ = choose_layout("auto", Policy(model, temperature=1.0), model, Accelerator())
    assert layout == ("padded" if ignores_positions else "shared_prefix")


def test_a_model_that_passes_no_segments_on_is_found_out(monkeypatch):
    model = built("qwen2")
    forward = model.base_model.forward
    monkeypatch.setattr(
        model.base_model, "forward", lambda segments=None, **kwargs: forward(**kwargs)
    )
    layout, why = choose_layout("auto", Policy(model, temperature=1.0), model, Accelerator())
    assert layout == "padded"
    assert "a trial run failed" in why


@pytest.mark.parametrize(
    ("layout", "run", "real"),
    [
        ("padded", 4 * 14, 7 + 3 + 14 + 11),
        ("packed", 7 + 3 + 14 + 11, 7 + 3 + 14 + 11),
        ("shared_prefix", 3 + 4 + 0 + 11 + 11, 3 + 4 + 0 + 11 + 11),
    ],
)
def test_tokens_run(layout, run, real):
    """Nothing for masked and empty rows, nor for the last token of a completion."""
    batch = micro_batch(layout)
    assert batch.input_ids.numel() == run
    assert int((batch.token_weights > 0).sum()) == real


def test_a_plain_head_is_used_without_logits_and_an_adapted_one_is_not():
    assert find_head(make_model()).linear is not None
    assert find_head(qwen2_with_lora_head().get_base_model()).linear is None


def test_entropy_is_that_of_the_tempered_distribution():
    model, batch = make_model(), make_batch()
    batch = micro_batch("shared_prefix", batch, [[5]])
    entropy = Policy(model, temperature=2.0).logps(batch).entropy
    logits = model(input_ids=batch.input_ids).logits[0, 8:] / 2.0
    assert torch.allclose(entropy, torch.distributions.Categorical(logits=logits).entropy())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_router_loss_is_the_models_own(layout):
    """Of the padded rows: a prompt that is run once counts for each of them."""
    model = built("mixtral")
    batch = micro_batch(layout, every_token=True)
    _, ours = Policy(model, temperature=1.0).loss(
        batch, LossInputs(advantages=torch.zeros(6)), {}, router_loss=True
    )
    padded = micro_batch("padded", every_token=True)
    out = model(
        input_ids=padded.input_ids, attention_mask=padded.token_weights, output_router_logits=True
    )
    assert torch.allclose(ours, out.aux_loss, rtol=1e-5)
    wanted = [p for n, p in model.named_parameters() if n != "lm_head.weight"]
    for a, b in zip(
        torch.autograd.grad(ours, wanted, allow_unused=True),
        torch.autograd.grad(out.aux_loss, wanted, allow_unused=True),
        strict=True,
    ):
        assert (a is None and b is None) or (a - b).norm() <= 1e-4 * b.norm() + 1e-9
    assert router_coef(model, None) == model.config.router_aux_loss_coef
    with pytest.raises(ValueError, match="is not a Mixture-of-Experts model"):
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
    assert run_inside(Wrapper(), model, lambda: 5) == 5
    assert calls == ["wrapper", "hook"]
    assert "forward" not in vars(model)


def test_dropout_is_found_and_put_off():
    model = make_model(attention_dropout=0.1)
    assert has_dropout(model)
    disable_dropout(model)
    assert not has_dropout(model)
    assert RLOOConfig("unused", disable_dropout=True).disable_dropout


@pytest.mark.parametrize(("rate", "expected"), [(0.1, "padded"), (0.0, "shared_prefix")])
def test_attention_dropout_leaves_the_padded_layout(rate, expected):
    """GPT-2 keeps the rate in a module; other dropout goes with every layout."""
    config = tf.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, attn_pdrop=rate)
    model = tf.GPT2LMHeadModel(config).train()
    layout, why = choose_layout("auto", Policy(model, temperature=1.0), model, Accelerator())
    assert layout == expected
    assert ("attention over segments has no dropout" in why) == (rate > 0)


def main() -> None:
    print(f"{'':36}" + "".join(f"{name:>24}" for name in [*LAYOUTS, "a tree"]) + "   auto")
    for name in MODELS:
        model = built(name)
        cells = []
        for layout, batch in [*((layout, None) for layout in LAYOUTS), ("shared_prefix", TREE)]:
            if (name, layout) in CASES:
                logp, gradient = differences(model, layout, batch)
                cells.append(f"{logp:.1e} {gradient:.1e}")
            else:
                cells.append("-")
        _, why = choose_layout("auto", Policy(model, temperature=1.0), model, Accelerator())
        print(f"{name:36}" + "".join(f"{cell:>24}" for cell in cells) + f"   {why}")


if __name__ == "__main__":
    main()
