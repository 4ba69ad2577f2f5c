"""Reward models: which number is read, where, from which tokens, and where the model waits."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
)

from rloo_fast.rewards import RewardModel, load_reward_functions, load_reward_model
from rloo_fast.rollout.engine import EngineState
from tests.end_to_end.test_train_options import make_trainer
from tests.support.pretend_gpu import PretendGpu, snapshot
from tests.support.tiny import WORDS, make_tokenizer

PAD, EOS = 0, 1
NAMES = {0: "NEGATIVE", 1: "NEUTRAL", 2: "POSITIVE"}
TEXTS = ["w1", "w3 w4 w5 w6", "w7 w8", "w9 w2 w1"]
IDS = [[7, EOS], [9], [14, 15, EOS], [8, 7]]  # of which the first and the third are finished


def make_decoder(num_labels: int = 1, **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    names = {i: NAMES[i] for i in range(num_labels)}
    config = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5,
        "id2label": names, "label2id": {text: i for i, text in names.items()},
    }  # fmt: skip
    return GPTNeoXForSequenceClassification(GPTNeoXConfig(**{**config, **overrides}))


def make_encoder(most_tokens: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=34, dim=16, hidden_dim=32, n_layers=2, n_heads=2, initializer_range=0.5,
            max_position_embeddings=most_tokens, num_labels=2,
        )
    )  # fmt: skip


def encoder_tokenizer() -> Any:
    tokenizer = make_tokenizer(cls_token="[CLS]", sep_token="[SEP]")  # ids 32 and 33
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 32), ("[SEP]", 33)]
    )
    return tokenizer


def logits_at_the_end(model: Any, ids: list[int]) -> torch.Tensor:
    """What the head says of the last of these tokens, whichever it is: (labels,)."""
    base = getattr(model, model.base_model_prefix)
    with torch.no_grad():
        hidden = base(input_ids=torch.tensor([ids])).last_hidden_state
        return model.eval().score(hidden[0, -1])


def words(text: str) -> list[int]:
    return [6 + WORDS.index(word) for word in text.split()]


def assert_close(got: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected), rtol=1e-5, atol=1e-6)


def recorded(model: nn.Module) -> list[dict[str, Any]]:
    """The inputs of every forward from now on."""
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


# --- the label and its number


@pytest.mark.parametrize("label", [2, "2", "POSITIVE"])
@pytest.mark.parametrize("output", ["logit", "probability"])
def test_a_label_by_number_and_by_name(label, output):
    model = make_decoder(num_labels=3)
    logits = torch.stack([logits_at_the_end(model, words(text)) for text in TEXTS])
    expected = logits if output == "logit" else logits.softmax(dim=1)
    reward = RewardModel(model, make_tokenizer(), label=label, output=output)
    assert_close(reward([""] * 4, TEXTS), expected[:, 2])


def test_the_probability_of_a_single_label_is_its_sigmoid():
    model = make_decoder()
    logits = torch.stack([logits_at_the_end(model, words(text))[0] for text in TEXTS])
    reward = RewardModel(model, make_tokenizer(), output="probability")
    assert_close(reward([""] * 4, TEXTS), logits.sigmoid())


def test_labels_that_do_not_exclude_each_other_have_a_probability_each():
    model = make_decoder(num_labels=3, problem_type="multi_label_classification")
    expected = [logits_at_the_end(model, words(text))[1].sigmoid().item() for text in TEXTS]
    reward = RewardModel(model, make_tokenizer(), label="NEUTRAL", output="probability")
    assert_close(reward([""] * 4, TEXTS), expected)


@pytest.mark.parametrize("label", ["positive", 3, "-1", True])
def test_a_label_that_is_not_there_is_refused_with_those_that_are(label):
    there = r"0 \(NEGATIVE\), 1 \(NEUTRAL\), 2 \(POSITIVE\)"
    with pytest.raises(ValueError, match=f"reward_model_label={label!r}.*{there}"):
        RewardModel(make_decoder(num_labels=3), make_tokenizer(), label=label)


@pytest.mark.parametrize(("num_labels", "lines"), [(3, 1), (1, 0)])
def test_that_the_first_of_several_labels_is_the_reward_is_said(num_labels, lines, caplog):
    RewardModel(make_decoder(num_labels), make_tokenizer())
    assert sum("0 (NEGATIVE), 1 (NEUTRAL)" in r.getMessage() for r in caplog.records) == lines


@pytest.mark.parametrize("wrong", [{"output": "odds"}, {"position": "first"}])
def test_choices_there_are_not_are_refused(wrong):
    with pytest.raises(ValueError, match=r"logit or probability|last or eos"):
        RewardModel(make_decoder(), make_tokenizer(), **wrong)


# --- loading by name


def saved(path: Any, model: Any, tokenizer: Any = None) -> str:
    model.save_pretrained(path)
    (tokenizer or make_tokenizer()).save_pretrained(path)
    return str(path)


def test_a_checkpoint_keeps_all_its_labels(tmp_path):
    model = make_decoder(num_labels=3)
    reward = load_reward_model(saved(tmp_path, model), label="POSITIVE")
    assert_close(reward([""], ["w3 w4"])[0], logits_at_the_end(model, words("w3 w4"))[2])


def test_a_head_of_one_whose_config_does_not_say_so_is_loaded(tmp_path):
    model = make_decoder()
    config = json.loads((tmp_path / saved(tmp_path, model) / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    reward = load_reward_model(str(tmp_path))
    assert_close(reward([""], ["w3 w4"])[0], logits_at_the_end(model, words("w3 w4"))[0])


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_model_is_loaded_in_the_type_asked_for_and_gives_float32(name, tmp_path):
    kwargs = {"torch_dtype": "float32"}  # of all models
    reward = load_reward_model(
        saved(tmp_path, make_decoder()), dtype=name, model_init_kwargs=kwargs
    )
    assert {p.dtype for p in reward.model.parameters()} == {getattr(torch, name)}
    values = reward([""] * 4, TEXTS)
    assert values.dtype == torch.float32
    exact = RewardModel(make_decoder(), make_tokenizer())([""] * 4, TEXTS)
    assert 0 < (values - exact).abs().max() < 0.05


# --- where a decoder is read


@pytest.mark.parametrize("pad", ["<eos>", "<pad>", "w1"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_at_eos_the_value_is_that_of_the_text_with_its_eos_alone(pad, batch_size):
    model, tokenizer = make_decoder(), make_tokenizer(pad_token=pad)
    reward = RewardModel(model, tokenizer, position="eos", batch_size=batch_size)
    finished = [EOS in ids for ids in IDS]
    expected = [
        logits_at_the_end(model, words(text) + [EOS] * end)[0].item()
        for text, end in zip(TEXTS, finished, strict=True)
    ]
    assert finished == [True, False, True, False]
    assert_close(reward([""] * 4, TEXTS, finished), expected)


def test_at_eos_what_ends_a_completion_is_the_policys_matter():
    model = make_decoder()
    rewards = load_reward_functions(model, make_tokenizer(), model_options={"position": "eos"})
    table = rewards([""] * 4, TEXTS, IDS, {}, ended=[False, True, False, False])
    expected = logits_at_the_end(model, [*words(TEXTS[1]), EOS])[0]  # its ids have no EOS
    assert_close(table[1, 0], expected)


def test_the_last_token_is_read_without_eos_unless_it_is_asked_for():
    model = make_decoder()
    reward = RewardModel(model, make_tokenizer())
    expected = [logits_at_the_end(model, words(text))[0].item() for text in TEXTS]
    assert_close(reward([""] * 4, TEXTS), expected)


@pytest.mark.parametrize("ending", ["<eos>", "<eos> \n", ""])
@pytest.mark.parametrize("finished", [True, False])
def test_at_eos_a_chat_has_one_eos_if_it_is_finished_and_none_if_not(ending, finished):
    template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}" + ending
    model, tokenizer = make_decoder(), make_tokenizer(chat_template=template)
    seen = recorded(model)
    chat = [[{"role": "user", "content": "w1"}]], [[{"role": "assistant", "content": "w2"}]]
    RewardModel(model, tokenizer, position="eos")(*chat, [finished])
    assert seen[0]["input_ids"].tolist() == [[7, 8, EOS] if finished else [7, 8]]


@pytest.mark.parametrize(
    ("tokenizer", "sentence"),
    [
        (lambda: encoder_tokenizer(), "is an encoder.*Write 'last'"),
        (lambda: make_tokenizer(eos_token=None), "needs an EOS token"),
    ],
    ids=["encoder", "no-eos"],
)
def test_reading_at_eos_is_refused_where_it_cannot_be(tokenizer, sentence):
    with pytest.raises(ValueError, match=sentence):
        RewardModel(make_decoder(), tokenizer(), position="eos")


def test_reading_at_eos_needs_to_know_what_ended():
    with pytest.raises(ValueError, match="needs `ended`"):
        RewardModel(make_decoder(), make_tokenizer(), position="eos")([""], ["w1"])


# --- tokens


def test_an_encoder_gets_its_special_tokens():
    model, tokenizer = make_encoder(), encoder_tokenizer()
    seen = recorded(model)
    values = RewardModel(model, tokenizer, label=1)(["w1 "] * 2, ["w2", "w3 w4"])
    assert seen[0]["input_ids"].tolist() == [[32, 7, 9, 10, 33], [32, 7, 8, 33, PAD]]
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([[32, 7, 8, 33]])).logits[0, 1]
    assert_close(values[0], alone)


def test_a_text_too_long_for_an_encoder_loses_its_beginning_but_not_cls(caplog):
    model = make_encoder(most_tokens=6)
    seen = recorded(model)
    reward = RewardModel(model, encoder_tokenizer(), label=0)
    for _ in range(2):
        reward(["w1 "] * 2, ["w2 w3 w4 w5 w6 w7", "w2"])
    assert seen[0]["input_ids"].tolist() == [[32, 10, 11, 12, 13, 33], [32, 7, 8, 33, PAD, PAD]]
    (line,) = [r.getMessage() for r in caplog.records if "longer" in r.getMessage()]
    assert "takes 6 tokens: 1 of 2 texts are longer" in line


@pytest.mark.parametrize("limit", ["config", "tokenizer"])
def test_a_text_too_long_for_a_decoder_keeps_its_end(limit):
    model = make_decoder(max_position_embeddings=4) if limit == "config" else make_decoder()
    tokenizer = make_tokenizer(**({"model_max_length": 4} if limit == "tokenizer" else {}))
    seen = recorded(model)
    RewardModel(model, tokenizer, position="eos")([""], ["w1 w2 w3 w4 w5"], [True])
    assert seen[0]["input_ids"].tolist() == [[*words("w3 w4 w5"), EOS]]


def test_one_long_text_does_not_pad_the_short_ones():
    model = make_decoder()
    seen = recorded(model)
    texts = ["w1 w2"] * 15 + [" ".join(["w3"] * 60)] + ["w4 w5 w6"] * 16
    RewardModel(model, make_tokenizer())([""] * 32, texts)
    real = sum(len(text.split()) for text in texts)
    assert (real, sum(inputs["input_ids"].numel() for inputs in seen)) == (138, 60 * 2 + 3 * 30)


def test_texts_of_like_lengths_stay_together():
    model = make_decoder()
    seen = recorded(model)
    texts = [" ".join(["w1"] * n) for n in range(10, 42)]
    RewardModel(model, make_tokenizer())([""] * 32, texts)
    assert len(seen) == 1


# --- waiting on the host


def parked(**options: Any) -> tuple[RewardModel, PretendGpu]:
    reward, gpu = RewardModel(make_decoder(), make_tokenizer(), **options), PretendGpu()
    reward.park(torch.device("cpu"), gpu)
    return reward, gpu


def test_a_parked_model_is_on_the_gpu_only_while_it_scores():
    reward, gpu = parked(batch_size=2)
    weights = sum(t.nbytes for t in [*reward.model.parameters(), *reward.model.buffers()])
    tensors = [*reward.model.parameters(), *reward.model.buffers()]
    before, used = snapshot(tensors), []
    reward.model.register_forward_pre_hook(lambda *_: used.append(gpu.used))
    gpu.calls.clear()
    for _ in range(2):
        values = reward([""] * 4, TEXTS)
        assert gpu.used == 0
    assert used == [weights] * 4
    assert gpu.calls.count("copy") == 2 * len(tensors)  # to the GPU, and not back
    assert snapshot(tensors) == before
    assert_close(values, RewardModel(make_decoder(), make_tokenizer())([""] * 4, TEXTS))


def test_a_parked_model_that_was_on_the_gpu_leaves_it():
    reward, gpu = RewardModel(make_decoder(), make_tokenizer()), PretendGpu()
    gpu.put(*reward.model.parameters())
    reward.park(torch.device("cpu"), gpu)
    assert gpu.used == 0


@pytest.mark.parametrize("fault", ["copy", "forward"])
def test_a_parked_model_is_back_on_the_host_after_a_failure(fault):
    reward, gpu = parked()
    before = snapshot(reward.model.parameters())
    if fault == "copy":
        gpu.calls.clear()
        gpu.fails_at = 3
    else:
        reward.model.forward = lambda **_: 1 / 0
    with pytest.raises((torch.OutOfMemoryError, ZeroDivisionError)):
        reward([""] * 4, TEXTS)
    gpu._pending.clear()  # whose targets a failed copy leaves behind
    assert gpu.used == 0
    assert snapshot(reward.model.parameters()) == before


def test_a_model_of_other_tensors_cannot_be_parked():
    class Quantised(torch.Tensor):
        pass

    reward = RewardModel(make_decoder(), make_tokenizer())
    data = torch.zeros(1, 16).as_subclass(Quantised)
    reward.model.score.weight = nn.Parameter(data, requires_grad=False)  # pyright: ignore
    with pytest.raises(ValueError, match="not quantised or sharded"):
        reward.park(torch.device("cpu"), PretendGpu())


# --- in a run


def test_a_reward_model_object_keeps_its_own_settings():
    model = make_decoder(num_labels=3)
    mine = RewardModel(model, make_tokenizer(), label="POSITIVE")
    rewards = load_reward_functions([mine, "length"], reward_kwargs={"length": {"target": 1}},
                                    model_options={"label": 0})  # fmt: skip
    assert_close(rewards([""], ["w3"], [[9]], {})[0], [logits_at_the_end(model, [9])[2].item(), 0])


def test_reward_kwargs_of_a_model_go_before_the_settings_of_all(tmp_path):
    model = make_decoder(num_labels=3)
    name = saved(tmp_path, model)
    rewards = load_reward_functions(
        [name], reward_kwargs={name: {"label": "POSITIVE"}},
        model_options={"label": 0, "output": "probability"},
    )  # fmt: skip
    expected = logits_at_the_end(model, [9]).softmax(0)[2].item()
    assert_close(rewards([""], ["w3"], [[9]], {}), [[expected]])
    with pytest.raises(ValueError, match=r"takes no 'lable'. It takes 'label', 'output'"):
        load_reward_functions([name], reward_kwargs={name: {"lable": 1}})


def test_the_settings_of_a_run_reach_its_reward_model(tmp_path):
    model = make_decoder(num_labels=3)
    trainer = make_trainer(
        tmp_path, reward_funcs=saved(tmp_path / "judge", model), reward_model_label="POSITIVE",
        reward_model_output="probability", reward_model_position="eos", stop_token_id=9,
        reward_model_dtype="bfloat16",
    )  # fmt: skip
    expected = logits_at_the_end(model.bfloat16(), [8, EOS]).float().softmax(0)[2]
    got = trainer.rewards([""], ["w2"], [[8, 9]], {}, ended=[True])[0, 0]
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0)
    assert trainer.rewards.models[0].dtype == torch.bfloat16


def test_an_offloaded_model_scores_once_the_engine_is_asleep(tmp_path):
    states = []
    trainer = make_trainer(
        tmp_path, reward_funcs=saved(tmp_path / "judge", make_decoder()),
        reward_model_offload=True, max_steps=1,
    )  # fmt: skip
    judge = trainer.rewards.models[0]
    judge.register_forward_pre_hook(lambda *_: states.append(trainer.rollouts.engine.state))
    trainer.train()
    assert set(states) == {EngineState.ASLEEP}


def test_a_model_that_stays_scores_while_the_engine_is_awake(tmp_path):
    states = []
    name = saved(tmp_path / "judge", make_decoder())
    trainer = make_trainer(tmp_path, reward_funcs=name, max_steps=1)
    judge = trainer.rewards.models[0]
    judge.register_forward_pre_hook(lambda *_: states.append(trainer.rollouts.engine.state))
    trainer.train()
    assert set(states) == {EngineState.READY}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="moves a model to a real GPU and back")
def test_a_real_gpu_holds_a_parked_model_only_while_it_scores():
    reward = RewardModel(make_decoder(), make_tokenizer())
    expected = reward([""] * 4, TEXTS)
    reward.park(torch.device("cuda", 0))
    start = torch.cuda.memory_allocated()
    values = reward([""] * 4, TEXTS)
    assert torch.cuda.memory_allocated() == start
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-4)
