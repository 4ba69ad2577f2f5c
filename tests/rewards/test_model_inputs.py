"""What reward models read of a completion, and that batches change nothing."""

import pytest
import torch
from tokenizers import processors
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rloo_fast.rewards import RewardError, load_reward_functions
from tests.support.rewards import (
    CHAT_COMPLETIONS,
    CHAT_PROMPTS,
    COMPLETIONS,
    IDS,
    PROMPTS,
    WORDS,
    assert_same,
    make_model,
    make_tokenizer,
    returns,
    score,
)


def one_by_one(model, tokenizer, texts):
    """logits[0, 0] of each text on its own."""
    values = []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            values.append(model.eval()(input_ids=ids).logits[0, 0])
    return torch.stack(values)


def assert_close(rewards, expected):
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-6)


def test_reward_model_directory_scores_prompt_plus_completion(reward_model_dir):
    # No space between prompt and completion: the words at the seam are one unknown word.
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = one_by_one(make_model(), make_tokenizer(), texts)
    assert_close(score(str(reward_model_dir))[:, 0], expected)


def test_reward_model_applies_its_chat_template(reward_model_dir):
    texts = [
        f"user : {p} </s> assistant : {c} </s> " for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    model, tokenizer = make_model(), make_tokenizer(eos_token="</s>")
    model.config.pad_token_id = tokenizer.eos_token_id  # as no pad token is defined
    assert_close(score(str(reward_model_dir), chat=True)[:, 0], one_by_one(model, tokenizer, texts))


def test_chat_template_gets_its_kwargs(reward_model_dir):
    tokenizer = make_tokenizer(eos_token="</s>", chat_template="{{ word }}")
    rewards = score(
        make_model(), chat=True, processing_classes=tokenizer, chat_template_kwargs={"word": "two"}
    )
    assert_close(rewards[:, 0], one_by_one(make_model(), tokenizer, ["two"] * 3))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("special", [{"pad_token": "<pad>"}, {"eos_token": "</s>"}])
def test_batches_equal_one_by_one(batch_size, special):
    generator = torch.Generator().manual_seed(1)
    texts = [
        " ".join(WORDS[i] for i in torch.randint(3, len(WORDS), (n,), generator=generator))
        for n in (5, 1, 17, 2, 9, 9, 3, 30, 1, 4)
    ]
    model, tokenizer = make_model(), make_tokenizer(**special)
    rewards = load_reward_functions(model, tokenizer, batch_size=batch_size)
    got = rewards([""] * 10, texts, [[]] * 10, {})[:, 0]
    assert_close(got, one_by_one(make_model(), tokenizer, texts))
    assert len(set(got.tolist())) > 5


def test_batches_are_right_padded_without_special_tokens_and_bounded():
    model = make_model()
    tokenizer = make_tokenizer(pad_token="<pad>", padding_side="left")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 1)]
    )
    seen, forward = [], model.forward

    def spy(**inputs):
        output = forward(**inputs)
        seen.append((inputs["input_ids"].tolist(), output.past_key_values))
        assert torch.is_inference_mode_enabled()
        return output

    model.forward = spy
    rewards = load_reward_functions(model, tokenizer, batch_size=2)
    rewards([""] * 3, ["user", "user user user", "user user"], [[]] * 3, {})
    assert seen == [([[3, 3, 3], [3, 3, 2]], None), ([[3]], None)]


@pytest.mark.parametrize(
    ("special", "pad_id"),
    [({"pad_token": "<pad>", "eos_token": "</s>"}, 2), ({"eos_token": "</s>"}, 1)],
)
def test_model_gets_the_tokenizers_pad_token_or_its_eos(special, pad_id):
    model = make_model()
    load_reward_functions(model, make_tokenizer(**special))
    assert model.config.pad_token_id == pad_id


def test_first_label_of_several_is_the_reward():
    model, tokenizer = make_model(num_labels=3), make_tokenizer(pad_token="<pad>")
    expected = one_by_one(
        model, tokenizer, [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    )
    assert_close(score(model, processing_classes=tokenizer)[:, 0], expected)


def test_model_without_label_column_is_refused():
    model = LlamaForCausalLM(make_model().config)  # logits (batch, tokens, vocabulary)
    tokenizer = make_tokenizer(pad_token="<pad>")
    with pytest.raises(ValueError, match=r"'LlamaForCausalLM' must return logits of shape"):
        score(model, processing_classes=tokenizer)


def test_reward_model_runs_in_eval_mode_without_gradients():
    model = make_model().train()
    tokenizer = make_tokenizer(pad_token="<pad>")
    rewards = load_reward_functions(model, tokenizer)
    model.train()  # as a careless callback would
    first = rewards(PROMPTS, COMPLETIONS, IDS, {})
    assert_same(first, rewards(PROMPTS, COMPLETIONS, IDS, {}).tolist())
    assert not first.requires_grad


def test_module_from_a_directory_finds_its_tokenizer(reward_model_dir):
    model = LlamaForSequenceClassification.from_pretrained(reward_model_dir)
    rewards = load_reward_functions([returns([0, 0, 0]), model])
    assert rewards.names == ["fixed", "tiny-reward"]
    assert rewards.models == [model]
    assert_close(rewards(PROMPTS, COMPLETIONS, IDS, {})[:, 1:], score(str(reward_model_dir)))


def test_models_can_be_moved_and_replaced():
    rewards = load_reward_functions(make_model(), make_tokenizer(pad_token="<pad>"))
    before = rewards(PROMPTS, COMPLETIONS, IDS, {})
    other = make_model(seed=1)
    other.config.pad_token_id = 2
    rewards.models = [other]
    assert rewards.to("cpu").models == [other]
    assert not torch.equal(rewards(PROMPTS, COMPLETIONS, IDS, {}), before)


def test_language_model_checkpoint_is_refused_as_a_reward_model(tmp_path):
    LlamaForCausalLM(make_model().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a trained reward model: its checkpoint lacks score"):
        load_reward_functions(str(tmp_path))


def test_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the directory holds no config"):
        load_reward_functions(str(tmp_path))


def test_raising_model_is_named(reward_model_dir):
    rewards = load_reward_functions(str(reward_model_dir))
    rewards.models[0].forward = lambda **kwargs: 1 / 0
    with pytest.raises(RewardError, match="'tiny-reward' raised ZeroDivisionError"):
        rewards(PROMPTS, COMPLETIONS, IDS, {})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: (make_model(), None), "does not say where it came from"),
        (lambda: (torch.nn.Linear(2, 1), make_tokenizer()), "Linear has no config"),
        (lambda: (make_model(), make_tokenizer()), "neither a pad nor an EOS"),
        (
            lambda: (make_model(), [None, None]),
            r"processing classes \(2\) must match the number of reward functions \(1\)",
        ),
    ],
    ids=["no-tokenizer", "no-config", "no-pad", "too-many"],
)
def test_unusable_models_are_refused_at_load(make, sentence):
    model, tokenizer = make()
    with pytest.raises(ValueError, match=sentence):
        load_reward_functions(model, tokenizer)


@pytest.mark.parametrize(
    ("prompts", "completions", "sentence"),
    [
        (CHAT_PROMPTS, CHAT_COMPLETIONS, "no chat template"),
        (PROMPTS, CHAT_COMPLETIONS, "one format.*sample 0"),
        (["", "two"], ["", "one"], "without tokens: sample 0"),
    ],
    ids=["no-template", "mixed", "empty"],
)
def test_unreadable_samples_are_refused(prompts, completions, sentence):
    rewards = load_reward_functions(make_model(), make_tokenizer(pad_token="<pad>"))
    with pytest.raises(ValueError, match=sentence):
        rewards(prompts, completions, [[]] * len(prompts), {})
