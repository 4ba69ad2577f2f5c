"""Conversations with tools over the real vLLM, in the trainer's process and as a server."""

from __future__ import annotations

import pytest

from tests.rollout.trajectories.test_runs import logged, make_trainer, noise_model
from tests.support.chats import noise_tokenizer
from tests.support.serving import serving
from tests.support.tiny import require_vllm

require_vllm()
pytestmark = [pytest.mark.slow, pytest.mark.vllm]

ENGINE = {"kv_cache_memory_bytes": 32 << 20, "max_num_seqs": 32}
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize("template", [None, "QwQ, opened and dropped"])
def test_in_the_trainers_process(template, tmp_path):
    trainer = make_trainer(
        tmp_path, template=template, sizes=HEADS, use_vllm=True, vllm_enable_sleep_mode=True,
        vllm_engine_kwargs=ENGINE, weight_sync_bucket_mib=1, max_steps=3,
    )  # fmt: skip
    try:
        trainer.train()
    finally:
        trainer.rollouts.close()
    assert len(logged(trainer, "sampling/logp_diff_max")) == 3
    assert max(logged(trainer, "sampling/logp_diff_max")) < 1e-4
    assert min(logged(trainer, "tools/turns")) > 1.5


def test_by_a_server_when_asked_and_ahead_of_the_step(tmp_path):
    """Whose requests have as much room as their conversations: its context holds no more."""
    tokenizer = noise_tokenizer()
    most = 464  # of the longest prompt with its tool, and 160 tokens
    folder = tmp_path / "server"
    folder.mkdir()
    with serving(
        folder, "--max-model-len", str(most), model=noise_model(tokenizer, **HEADS),
        tokenizer=tokenizer,
    ) as server:  # fmt: skip
        trainer = make_trainer(
            tmp_path / "run", sizes=HEADS, use_vllm=True, vllm_mode="server",
            vllm_server_base_url=server.url, max_steps=3,
        )  # fmt: skip
        trainer.train()
        trainer.rollouts.close()
        ahead = make_trainer(
            tmp_path / "ahead", sizes=HEADS, use_vllm=True, vllm_mode="server", tool_threads=4,
            vllm_server_base_url=server.url, max_steps=5, max_staleness=2, learning_rate=1e-3,
        )  # fmt: skip
        ahead.train()
        ahead.rollouts.close()
    assert len(logged(trainer, "sampling/logp_diff_max")) == 3
    assert 0 < max(logged(ahead, "staleness/max")) <= 2
    for run in (trainer, ahead):  # of young tokens
        assert max(logged(run, "sampling/logp_diff_max")) < 1e-4
        assert min(logged(run, "tools/turns")) > 1.5
