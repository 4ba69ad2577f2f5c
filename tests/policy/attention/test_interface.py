"""Attention over segments in models of transformers: switching, checkpointing, what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rloo_fast.batching.layouts import LAYOUTS
from rloo_fast.batching.segments import make_segments
from rloo_fast.policy.attention.interface import (
    NAME,
    keep_for_backward,
    restore,
    segment_attention,
    segment_attention_forward,
)
from tests.support.attention_cases import NO_MODULE
from tests.support.kernel_helpers import (  # noqa: F401
    Watch,
    assert_error_at_most_twice,
    bounds,
    nan_in_new_memory,
)

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": {},
    "gpt_neox": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "head_dim": 8, "query_pre_attn_scalar": 8},
}


def tiny(family, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**TINY, **FAMILIES.get(family, {}), **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def a_batch(seed=0):
    """Two groups as rows of ids, and as one row with its positions and segments."""
    g = torch.Generator().manual_seed(seed)
    ids, pos, lengths, parents, rows = [], [], [], [], []
    for size, sizes in ((9, (4, 0, 7)), (4, (1, 12))):
        prompt, number = torch.randint(40, (size,), generator=g), len(lengths)
        ids.append(prompt)
        pos.append(torch.arange(size))
        lengths.append(size)
        parents.append(-1)
        for n in sizes:
            completion = torch.randint(40, (n,), generator=g)
            first = sum(lengths)
            ids.append(completion)
            pos.append(torch.arange(size, size + n))
            lengths.append(n)
            parents.append(number)
            rows.append((torch.cat([prompt, completion]), size, torch.arange(first, first + n)))
    return torch.cat(ids)[None], torch.cat(pos)[None], make_segments(lengths, parents, "cpu"), rows


def shared_hidden(model, ids, pos, segments):
    with segment_attention(model):
        out = model.base_model(input_ids=ids, position_ids=pos, use_cache=False, segments=segments)
    keep_for_backward(out.last_hidden_state, model)
    return out.last_hidden_state


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_runs_as_on_separate_rows(family):
    model = tiny(family).train()
    ids, pos, segments, rows = a_batch()
    weight = torch.randn(TINY["hidden_size"], generator=torch.Generator().manual_seed(1))
    separate = [
        model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0, size:]
        for row, size, _ in rows
    ]
    want = torch.cat(separate)
    want_grads = gradients(model, (want.tanh() @ weight).sum())
    hidden = shared_hidden(model, ids, pos, segments)
    got = hidden[0, torch.cat([at for *_, at in rows])]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    got_grads = gradients(model, (got.tanh() @ weight).sum())
    assert got_grads.keys() == want_grads.keys()
    for name, g in got_grads.items():
        error = (g - want_grads[name]).norm() / (want_grads[name].norm() + 1e-6)
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_run_again_with_the_same_attention(reentrant):
    model = tiny("llama").train()
    ids, pos, segments, _ = a_batch()
    want = gradients(model, shared_hidden(model, ids, pos, segments).square().sum())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    hidden = shared_hidden(model, ids, pos, segments)
    assert model.config._attn_implementation == "eager"
    got = gradients(model, hidden.square().sum())
    assert model.config._attn_implementation == "eager"
    for name, g in want.items():
        torch.testing.assert_close(got[name], g)


def test_a_backward_that_raises_leaves_the_next_forward_right():
    model = tiny("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, pos, segments, _ = a_batch()

    def fail(grad):
        raise ArithmeticError("planted")

    for recover in (lambda: restore(model), lambda: shared_hidden(model, ids, pos, segments)):
        handle = model.base_model.embed_tokens.register_forward_hook(
            lambda module, args, out: out.register_hook(fail) and None
        )
        hidden = shared_hidden(model, ids, pos, segments)
        handle.remove()
        with pytest.raises(ArithmeticError, match="planted"):
            hidden.sum().backward()
        assert model.config._attn_implementation == NAME
        recover()
        assert model.config._attn_implementation == "eager"
    with segment_attention(model), pytest.raises(RuntimeError, match="needs segments"):
        model(input_ids=ids)
    assert model.config._attn_implementation == "eager"


def test_backward_inside_the_context_leaves_it_on():
    model = tiny("llama").train()
    ids, pos, segments, _ = a_batch()
    with segment_attention(model):
        shared_hidden(model, ids, pos, segments).sum().backward()
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "eager"


def test_a_wrapper_of_a_switched_model_does_not_take_the_name_for_the_models_own():
    model = tiny("llama")
    wrapper = torch.nn.ModuleList([model])
    for order in ((model, wrapper), (wrapper, model)):
        contexts = {m: segment_attention(m) for m in (model, wrapper)}
        for m in (model, wrapper):
            contexts[m].__enter__()
        assert model.config._attn_implementation == NAME
        for m in order:
            contexts[m].__exit__(None, None, None)
        assert model.config._attn_implementation == "eager"


def test_sub_configs_are_switched_and_restored():
    """A multimodal model's layers look at the text config, beside one that no layer looks at."""
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**TINY, "head_dim": 8, "model_type": "gemma3_text"},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config.text_config, attn_implementation="sdpa")
    wrapper = torch.nn.ModuleList([model])
    wrapper.config = config
    config.vision_config._attn_implementation = "eager"
    before = config._attn_implementation
    with segment_attention(wrapper):
        assert config._attn_implementation == config.text_config._attn_implementation == NAME
        assert config.vision_config._attn_implementation == "eager"
    assert config._attn_implementation == before
    assert config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("llama", {}, None),
        ("gemma2", {}, None),
        ("gpt_neox", {}, None),
        ("bloom", {}, "does not take its attention from transformers' AttentionInterface"),
        ("gpt_oss", {"num_local_experts": 2, "head_dim": 8}, "sinks"),
        ("lfm2", {"layer_types": ["full_attention", "conv"]}, "its layers include conv"),
        ("mamba", {}, "carry a state"),
        ("minimax", {"layer_types": ["full_attention", "linear_attention"], "head_dim": 8,
                     "num_local_experts": 2}, "its layers include linear attention"),
        ("doge", {}, "depends on a mask"),
        ("gemma3_text", {"use_bidirectional_attention": True, "head_dim": 8}, "not causal"),
        ("llama4_text", {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 16},
         "its layers include chunked attention"),
        ("lfm2", {"layer_types": ["full_attention"] * 2}, None),
    ],
)  # fmt: skip
def test_refusal_of_a_layout(family, options, reason):
    model = tiny(family, **options)
    for layout in ("shared_prefix", "packed"):
        found = LAYOUTS[layout].refusal(model)
        assert found == reason or reason in found
    assert LAYOUTS["padded"].refusal(model) is None


def test_refusal_of_an_encoder_decoder():
    config = AutoConfig.for_model("t5", d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration(config)
    assert "encoder-decoder" in LAYOUTS["packed"].refusal(model)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"segments": None}, RuntimeError, "needs segments"),
        ({"dropout": 0.1}, ValueError, "no dropout"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, ValueError, "no mask"),
        ({"s_aux": torch.zeros(2)}, NotImplementedError, "s_aux"),
        ({"position_bias": torch.zeros(1)}, NotImplementedError, "position_bias"),
        ({"output_attentions": True}, NotImplementedError, "output_attentions"),
        ({"segments": make_segments([2, 2], [-1] * 2, "cpu")}, ValueError, "cover 4 tokens"),
        ({"is_causal": False}, NotImplementedError, "causal"),
        ({"key": torch.zeros(1, 2, 9, 8)}, ValueError, "use_cache=False"),
        ({"query": torch.zeros(2, 2, 5, 8)}, ValueError, "one row"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_what_it_does_not_compute_it_refuses(change, error, sentence):
    row = torch.zeros(1, 2, 5, 8)
    given = dict.fromkeys(("query", "key", "value"), row)
    given |= {"attention_mask": None, "output_attentions": False}
    given["segments"] = make_segments([5], [-1], "cpu")
    segment_attention_forward(NO_MODULE, **given)
    with pytest.raises(error, match=sentence):
        segment_attention_forward(NO_MODULE, **{**given, **change})


@pytest.mark.parametrize(
    ("lengths", "parents", "options", "sentence"),
    [
        ([3, 2], [-1], {}, "give one for each"),
        ([3, 2], [-1, 1], {}, "the parent the segment before it"),
        ([3, 2, 1, 4], [-1, 0, -1, 1], {}, r"segment 3, tokens 6:10, has parent 1"),
        ([3, -1], [-1, 0], {}, "length must be >= 0"),
        ([3, 2], [-1, 0], {"pad_segments_to": 1}, "do not fit"),
        ([3, 2], [-1, 0], {"pad_keys_to": 7}, "do not fit"),
    ],
)
def test_make_segments_refuses(lengths, parents, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_segments(lengths, parents, "cpu", **options)


def test_make_segments_names_every_key():
    cut = make_segments([3, 2, 0, 1, 2], [-1, 0, 1, 1, 0], "cpu",
                        pad_segments_to=6, pad_keys_to=21)  # fmt: skip
    assert cut.bounds.tolist() == cut.cu_q.tolist() == [0, 3, 5, 5, 6, 8, 8]
    assert cut.cu_k.tolist() == bounds([3, 5, 0, 6, 5, 0]).tolist()
    whole = [0, 1, 2, *[0, 1, 2, 3, 4], *[0, 1, 2, 3, 4, 5], *[0, 1, 2, 6, 7]]
    assert cut.key_index.tolist() == [*whole, 0, 0]
    assert cut.parents.tolist() == [-1, 0, 1, 1, 0, -1]
