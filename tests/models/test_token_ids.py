"""Token ids that a model has no embedding for, said before anything is run."""

import pytest
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.models.loading import num_embeddings
from rloo_fast.rewards import RewardModel
from tests.support.rewards import make_model as make_reward_model
from tests.support.rewards import make_tokenizer as make_reward_tokenizer
from tests.support.tiny import make_model, make_tokenizer


def tokenizer_of(*added, **special):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(added))
    tokenizer.add_special_tokens(special)
    return tokenizer


def make(tmp_path, texts, tokenizer, model=None, **settings):
    args = RLOOConfig(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=2, report_to=[],
        max_completion_length=4, max_steps=3, disable_tqdm=True, logging_steps=1, **settings,
    )  # fmt: skip
    data = texts if isinstance(texts, IterableDataset) else Dataset.from_dict({"prompt": texts})
    model = model or make_model()
    return RLOOTrainer(
        model, lambda completions, **_: [0.0, 1.0], args, data, processing_class=tokenizer
    )


def test_a_prompt_with_a_token_that_was_added(tmp_path):
    with pytest.raises(ValueError, match=r"token id 32 \('extra'\).*below 32 only") as caught:
        make(tmp_path, ["w0", "w1 extra"], tokenizer_of("extra"))
    assert "model.resize_token_embeddings(len(tokenizer))" in str(caught.value)
    assert "'w1 extra'" in str(caught.value)


def test_a_model_that_was_resized_trains(tmp_path):
    tokenizer, model = tokenizer_of("extra"), make_model()
    model.resize_token_embeddings(len(tokenizer))
    make(tmp_path, ["w0", "w1 extra"], tokenizer, model).train()


def test_in_a_stream_at_the_first_such_row(tmp_path):
    rows = IterableDataset.from_generator(
        lambda: ({"prompt": "extra" if i == 2 else f"w{i}"} for i in range(9))
    )
    trainer = make(tmp_path, rows, tokenizer_of("extra"), shuffle_dataset=False)
    with pytest.raises(ValueError, match="has the token id 32"):
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("special", "settings", "what"),
    [
        ({"pad_token": "[PAD]"}, {}, r"pad token '\[PAD\]' has the id 32"),
        ({"eos_token": "[END]"}, {}, r"EOS token '\[END\]' has the id 32"),
        ({}, {"stop_token_id": 40}, "stop_token_id has the id 40"),
    ],
    ids=["pad", "eos", "stop_token_id"],
)
def test_special_tokens(tmp_path, special, settings, what):
    with pytest.raises(ValueError, match=what):
        make(tmp_path, ["w0"], tokenizer_of(**special), **settings)


def test_a_tokenizer_larger_than_the_model_is_taken_if_the_prompts_do_without(tmp_path):
    make(tmp_path, ["w0"], tokenizer_of("extra", "more")).train()


def test_embeddings_of_a_peft_model():
    model = make_model()
    target = LoraConfig(target_modules=["embed_tokens", "q_proj"])
    saved = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    assert num_embeddings(model) == 32
    assert num_embeddings(get_peft_model(make_model(), target)) == 32
    assert num_embeddings(get_peft_model(make_model(), saved)) == 32


def test_a_reward_model_with_another_tokenizer():
    model, tokenizer = make_reward_model(), make_reward_tokenizer(eos_token="</s>")
    size = model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"extra{i}" for i in range(size)])
    reward = RewardModel(model, tokenizer)
    with pytest.raises(ValueError, match=r"its tokenizer gives \d+ for the text of sample 1"):
        reward(["a", "a"], ["b", f"extra{size - 1}"])
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    with pytest.raises(ValueError, match=r"gives \d+ for the pad token"):
        RewardModel(model, tokenizer)
