"""A run has one definition of a completion that ended, whatever ended it."""

from __future__ import annotations

import math

import pytest
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.models.tokenizer import stop_token_ids
from rloo_fast.records import Rollout
from tests.rewards.test_models import make_decoder, saved
from tests.support.tiny import InjectedEngine, make_model, make_tokenizer

EOS, TURN, MINE = 1, 9, 10  # of the tokenizer, of the model's turns, of stop_token_id
PENALTY = 5.0
STOP = "w3 w"  # "w3 w7" has it, and the text ends in the middle of "w7"
COMPLETIONS = [  # of two prompts
    [20, EOS], [20, TURN], [20, MINE], [20, 9 + 2, 12],
    [20, 21, 22], [20, 21, 22], [EOS], [20, 21, EOS],
]  # fmt: skip


class Says(InjectedEngine):
    """Completions as they are given; `reasons`: what the engine says of each."""

    def __init__(self, completions, reasons=None):
        super().__init__()
        self.completions, self.reasons = completions, reasons or ["length"] * len(completions)

    def _generate(self, prompt_ids, sampling, seeds, on_finished):
        for row, ids in enumerate(self.completions):
            on_finished(row, list(ids))
        return Rollout([list(ids) for ids in self.completions], list(self.reasons))


def make_trainer(tmp_path, model=None, reward=None, **fields):
    args = RLOOConfig(
        str(tmp_path),
        **{
            "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 1,
            "max_completion_length": 3, "logging_steps": 1, "save_strategy": "no",
            "report_to": "none", "use_cpu": True, "disable_tqdm": True, "beta": 0.1,
            "gradient_checkpointing": False, "shuffle_dataset": False, "learning_rate": 0.01,
        } | fields,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["w1 w2", "w3"]})
    zero = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
    return RLOOTrainer(
        model or make_model(), reward or zero, args, rows, processing_class=make_tokenizer()
    )


def run(tmp_path, completions=None, reasons=None, **kwargs):
    trainer = make_trainer(tmp_path, **kwargs)
    if completions is not None:
        trainer.rollouts.engine = Says(completions, reasons)
    batches = []
    collect = trainer.collector.__class__._with_scores

    def with_scores(*args):
        batches.append(collect(trainer.collector, *args))
        return batches[-1]

    trainer.collector._with_scores = with_scores
    trainer.train()
    return batches[0], next(log for log in trainer.state.log_history if "loss" in log)


def chat_model():
    model = make_model()
    model.generation_config.eos_token_id = [EOS, TURN]
    return model


@pytest.mark.parametrize("overlap", [False, True])
def test_penalty_mask_and_metrics_agree_on_what_ended(overlap, tmp_path):
    batch, log = run(
        tmp_path, COMPLETIONS, model=chat_model(), stop_token="eos", stop_token_id=MINE,
        stop=[STOP], missing_eos_penalty=PENALTY, mask_truncated_completions=True,
        overlap_rewards=overlap,
    )  # fmt: skip
    ended = [True, True, True, False, False, False, True, True]
    assert batch.scores.tolist() == [0.0 if end else -PENALTY for end in ended]
    assert batch.rows.truncated.tolist() == [not end for end in ended]
    assert [count > 0 for count in batch.num_tokens] == ended
    assert log["val/num_eos_tokens"] == sum(ended)
    assert log["completions/clipped_ratio"] == 3 / 8
    assert log["completions/max_terminated_length"] == 3
    assert log["completions/mean_terminated_length"] == pytest.approx((2 + 2 + 2 + 1 + 3) / 5)


def test_what_an_engine_says_ended_did_even_without_a_token(tmp_path):
    batch, log = run(
        tmp_path, [[20, 21, 22]] * 8, ["stop"] * 4 + ["length"] * 4, missing_eos_penalty=PENALTY
    )
    assert batch.scores.tolist() == [0.0] * 4 + [-PENALTY] * 4
    assert log["val/num_eos_tokens"] == 4


@pytest.mark.parametrize(
    ("layout", "overlap"), [("shared_prefix", False), ("packed", True), ("padded", False)]
)
@pytest.mark.parametrize("include", [True, False])
def test_rewards_see_what_is_kept_of_a_stop_string(include, overlap, layout, tmp_path):
    seen = {}

    def reward(completions, completion_ids, **_):
        seen.update({tuple(ids): text for ids, text in zip(completion_ids, completions)})  # noqa: B905
        return [float(len(text)) for text in completions]

    sampled = [[20, 9, 13], [20, EOS], [9, 14], [20, 9, 15, 16], *[[9, 13]] * 4]
    batch, log = run(
        tmp_path, sampled, reward=reward, stop=STOP, include_stop_str_in_output=include,
        overlap_rewards=overlap, layout=layout, missing_eos_penalty=PENALTY,
    )  # fmt: skip
    if include:
        assert seen == {
            (20, 9, 13): "w14 w3 w", (20, EOS): "w14", (9, 14): "w3 w", (20, 9, 15): "w14 w3 w",
            (9, 13): "w3 w",
        }  # fmt: skip
    else:
        assert seen == {(20,): "w14 ", (20, EOS): "w14", (): ""}
    kept = [[20, 9, 13], [20, EOS], [9, 14], [20, 9, 15], *[[9, 13]] * 4]
    if not include:
        kept = [[20], [20, EOS], [], [20], [], [], [], []]
    assert batch.completion_ids == kept
    assert batch.num_tokens == [len(ids) for ids in kept]
    assert log["completions/clipped_ratio"] == 0
    assert log["val/num_eos_tokens"] == 8
    assert math.isfinite(log["grad_norm"])


@pytest.mark.parametrize("include", [True, False])
def test_a_run_with_transformers_stops_at_text_and_is_no_mismatch(include, tmp_path):
    texts = []

    def reward(completions, **_):
        texts.extend(completions)
        return [float(len(text)) for text in completions]

    batch, log = run(
        tmp_path, reward=reward, max_completion_length=12,
        generation_kwargs={"stop_strings": ["w1"], "include_stop_str_in_output": include},
    )  # fmt: skip
    ended = [text.endswith("w1") if include else "w1" not in text for text in texts]
    assert sum(ended) > 4
    assert all("w1" not in text[:-2] for text in texts)
    assert log["sampling/logp_diff_max"] < 1e-4
    assert len(batch.sampler_logps) == sum(batch.num_tokens)


def test_a_reward_model_reads_at_the_end_of_what_ended(tmp_path):
    seen = []
    reward = saved(tmp_path / "judge", make_decoder())
    trainer = make_trainer(tmp_path, reward=reward, reward_model_position="eos", stop=["w14"])
    trainer.rewards.models[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    trainer.rollouts.engine = Says([[20], [21, EOS], [21], [22]] * 2)
    trainer.train()
    rows = [[token for token in row if token != 0] for batch in seen for row in batch]
    assert sorted(row[-1] == EOS for row in rows) == [False] * 4 + [True] * 4


def test_every_declared_token_ends_a_completion():
    tokenizer = make_tokenizer(additional_special_tokens=["w5", "w6"])
    model = make_model()
    for declared in ([EOS, TURN], (EOS, TURN)):
        model.generation_config.eos_token_id = declared
        assert stop_token_ids(model, tokenizer, MINE) == (EOS, TURN, MINE)
    # special tokens are no text: one given as a stop string is a stop token
    assert stop_token_ids(model, tokenizer, None, ["w5", "w7", "w3 w6"]) == (EOS, TURN, 11)
