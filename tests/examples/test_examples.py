"""Each script of examples/ runs, and the reward at its end is that of a policy that has learned."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _beside_the_examples(monkeypatch):
    """As `python examples/NAME.py` does, so that they find tiny_model.py."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def run(name: str, *argv: str):
    return runpy.run_path(str(EXAMPLES / name))["main"](list(argv))


def test_the_loss_in_a_loop_teaches_a_gru_to_count():
    history = run("loss_in_a_loop.py", "--seed", "0")
    assert history[0] < 0.7
    assert min(history[-10:]) > 0.95


def test_the_trl_script_reaches_its_length():
    logs = run("trl_style.py")
    assert logs[0]["reward"] < -0.2
    assert logs[-1]["reward"] > -0.05
    assert 5.5 < logs[-1]["completions/mean_length"] < 6.5


def test_the_trl_script_runs_with_trl_when_its_import_is_changed_back(tmp_path):
    pytest.importorskip("trl")
    source, count = re.subn(
        "^from rloo_fast import RLOOConfig, RLOOTrainer  # was: (.*)$",
        r"\1",
        (EXAMPLES / "trl_style.py").read_text(),
        flags=re.MULTILINE,
    )
    assert count == 1
    assert "rloo_fast" not in source
    script = tmp_path / "trl_script.py"
    script.write_text(source)
    logs = runpy.run_path(str(script))["main"](["--max_steps", "2"])
    assert [log["step"] for log in logs] == [1, 2]


def test_a_tiny_model_learns_to_count_squares():
    shares = run("count_squares.py", "--seed", "0", "--max_steps", "100")
    assert shares[0] < 0.3
    assert shares[-1] > 0.5


@pytest.mark.parametrize("name", ["trl_style.py", "own_environment.py"])
def test_a_script_takes_a_model_and_saves_what_it_trained(name, tmp_path):
    words = runpy.run_path(str(EXAMPLES / name))["WORDS"]
    from tiny_model import tiny_model

    model, tokenizer = tiny_model(words, seed=1)
    model.save_pretrained(tmp_path / "given")
    tokenizer.save_pretrained(tmp_path / "given")
    given, out = str(tmp_path / "given"), str(tmp_path / "out")
    run(name, "--model_name_or_path", given, "--output_dir", out, "--max_steps", "2")
    trained = AutoModelForCausalLM.from_pretrained(out)
    before, after = model.model.embed_tokens.weight, trained.get_input_embeddings().weight
    assert after.shape == before.shape
    assert not torch.equal(after, before)


def test_the_environment_s_rewards_rise_and_apply_where_they_should():
    logs = run("own_environment.py")
    first, last = logs[0], logs[-1]
    assert first["rewards/correct/mean"] < 0.3
    assert last["rewards/correct/mean"] > 0.9  # over the rows that have an answer
    assert last["rewards/polite/mean"] > 0.95
    assert last["reward"] > first["reward"] + 0.4
    assert all(log["rewards/Varied/mean"] < 0 for log in logs)  # its memory spans calls
