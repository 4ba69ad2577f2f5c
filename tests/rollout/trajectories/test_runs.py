"""Whole runs in which a random model calls a tool in many of its turns."""

from __future__ import annotations

import threading

import pytest
import torch
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.batching.layouts import LAYOUTS
from tests.support.chats import TEMPLATES, VOCAB, echo, noise_tokenizer
from tests.support.tiny import make_model

QUESTIONS = Dataset.from_dict(
    {"prompt": [[{"role": "user", "content": f"question {i} ?"}] for i in range(12)]}
)


def noise_model(tokenizer, **sizes):
    """Random bytes, of which one in four or so ends a turn."""
    model = make_model(
        vocab_size=VOCAB,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    ends = [tokenizer.convert_tokens_to_ids(letter) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    return model


def even(completion_ids, **kwargs):
    return [float(sum(ids) % 5) for ids in completion_ids]


def make_trainer(directory, *, template=None, tools=(echo,), reward=even, sizes=None, **fields):
    tokenizer = noise_tokenizer()
    if template is not None:
        tokenizer.chat_template = TEMPLATES[template]
    settings = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 160,
        "max_steps": 2, "learning_rate": 0.01, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "beta": 0.05,
        "gradient_checkpointing": False, "bf16": False, "tool_threads": 0,
        "logp_diff_stop": 1e-3, "shuffle_dataset": False, **fields,
    }  # fmt: skip
    return RLOOTrainer(
        noise_model(tokenizer, **(sizes or {})),
        reward,
        RLOOConfig(str(directory), **settings),
        QUESTIONS,
        processing_class=tokenizer,
        tools=list(tools),
    )


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("template", [None, "QwQ, opened and dropped"])
def test_a_run_trains_on_what_was_sampled(template, layout, tmp_path):
    """The second template writes each call otherwise than the model: a strand for each turn."""
    collected = []
    trainer = make_trainer(tmp_path, template=template, layout=layout)
    collect = trainer.collector.collected

    def noting(scored, *args):
        collected.append(scored.rollout)
        return collect(scored, *args)

    trainer.collector.collected = noting
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert max(logged(trainer, "sampling/logp_diff_max")) < 1e-4
    assert any((a != b).any() for a, b in zip(before, trainer.model.parameters(), strict=True))
    trajectories = [one for rollout in collected for one in rollout.trajectories]
    assert max(one.num_turns for one in trajectories) >= 3
    strands = [len(one.strands) for one in trajectories]
    turns = [one.num_turns for one in trajectories]
    assert strands == ([1] * 16 if template is None else turns)
    sampled = [one.num_sampled for one in trajectories]
    assert logged(trainer, "completions/mean_length") == [
        sum(sampled[:8]) / 8,
        sum(sampled[8:]) / 8,
    ]
    calls = sum(one.num_calls for one in trajectories[:8])
    assert logged(trainer, "tools/call_frequency")[0] == calls / 8
    assert logged(trainer, "tools/failure_frequency") == [0, 0]


def test_layouts_and_micro_batches_give_the_same_weights(tmp_path):
    found = {}
    for layout, tokens in [*((name, None) for name in LAYOUTS), ("shared_prefix", 260)]:
        trainer = make_trainer(
            tmp_path, template="QwQ, opened and dropped", layout=layout, max_steps=1,
            max_tokens_per_micro_batch=tokens, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        found[layout, tokens] = flat, trainer.state.log_history[0]["grad_norm"]
    (first, norm), *others = found.values()
    assert norm > 0.01
    for weights, _ in others:
        assert (weights - first).norm() <= 1e-6 * first.norm()


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Mid-buffer: a generation batch lasts four steps, of which three are behind the checkpoint."""
    fields = {
        "max_steps": 6, "steps_per_generation": 2, "num_iterations": 2, "save_strategy": "steps",
        "save_steps": 3,
    }  # fmt: skip
    whole = make_trainer(tmp_path, **fields)
    whole.train()
    resumed = make_trainer(tmp_path, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert "tools/turns" in resumed.state.log_history[4]  # the second batch was sampled anew
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_trajectory_masked_for_its_length_counts_nowhere(tmp_path):
    trainer = make_trainer(
        tmp_path, mask_truncated_completions=True, max_completion_length=40, max_steps=1
    )
    batches = []
    prepare = trainer.update.preparer.__call__
    trainer.update = trainer.update._replace(
        preparer=lambda batch, *args, **kw: batches.append(batch) or prepare(batch, *args, **kw)
    )
    trainer.train()
    (batch,) = batches
    cut = batch.rows.truncated.tolist()
    assert any(cut)
    assert not all(cut)
    for row, is_cut in enumerate(cut):
        counted = sum(len(places) for places in batch.counted[row])
        assert counted == batch.num_tokens[row] == (0 if is_cut else batch.rows.length[row])


def test_dynamic_sampling_takes_groups_of_trajectories(tmp_path):
    def seldom(completion_ids, **kwargs):
        return [float(ids[0] % 2) if len(ids) % 2 else 0.0 for ids in completion_ids]

    trainer = make_trainer(tmp_path, reward=seldom, dynamic_sampling=True)
    trainer.train()
    assert logged(trainer, "frac_reward_zero_std") == [0, 0]
    assert max(logged(trainer, "sampling/logp_diff_max")) < 1e-4


def test_conversations_go_on_as_soon_as_their_tools_answer(tmp_path):
    """A slow tool keeps its own conversation back, not the others."""
    slow, first = threading.Event(), []

    def wait(word: str) -> str:
        """
        Wait once.

        Args:
            word: any

        Returns:
            a text
        """
        if not first:
            first.append(word)
            slow.wait(20)
        return "done"

    wait.__name__ = "echo"
    trainer = make_trainer(tmp_path, tools=[wait], tool_threads=4, max_steps=1)
    sizes, generate = [], trainer.rollouts.generate

    def noting(prompt_ids, *args, **kwargs):
        sizes.append(len(prompt_ids))
        if len(sizes) == 4:
            slow.set()
        return generate(prompt_ids, *args, **kwargs)

    trainer.rollouts.generate = noting
    trainer.train()
    assert slow.is_set()  # three rounds and a fourth, while that one waited
    assert sizes[0] == 8
