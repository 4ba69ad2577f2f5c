"""Engines by name: the builtin ones, and a user's own in one file, which a run trains with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer, cli
from rloo_fast.config.rollout_engine import SAME_AS
from rloo_fast.rollout import HFEngine, RolloutEngine, find_engine, register_engine, registry
from tests.support.fake_engine import FakeEngine
from tests.support.pages import files_shown
from tests.support.paths import ROOT
from tests.support.tiny import make_model, make_tokenizer

EXAMPLE = files_shown(ROOT / "docs" / "extending.md")["my_engine.py"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "ENGINES", dict(registry.ENGINES))
    Path("my_engine.py").write_text(EXAMPLE)
    return tmp_path


def trained(rollout_engine=None):
    """(trainer, losses and rewards of two steps)."""
    args = RLOOConfig(
        "out", per_device_train_batch_size=4, max_steps=2, max_completion_length=5, beta=0.1,
        learning_rate=0.01, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, gradient_checkpointing=False, rollout_engine=rollout_engine,
    )  # fmt: skip
    reward = lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids]  # noqa: E731
    rows = Dataset.from_dict({"prompt": ["w1 w2", "w3", "w4 w5", "w6"]})
    trainer = RLOOTrainer(make_model(), reward, args, rows, processing_class=make_tokenizer())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return trainer, [(log["loss"], log["reward"]) for log in logs]


@pytest.mark.parametrize("name", ["my_engine.py:logged", "my_engine.py:LoggedEngine"])
def test_a_run_trains_with_an_engine_of_the_users_own(name):
    _, expected = trained()
    trainer, logs = trained(name)
    assert type(trainer.rollouts.engine).__name__ == "LoggedEngine"
    assert logs == expected
    lines = Path("sampled.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 4
    assert all(1 <= len(json.loads(line)) <= 5 for line in lines)


def test_an_engine_that_holds_its_own_weights_is_sent_them():
    class Counting(FakeEngine):
        """Without log-probs of its own, as its completions are not the policy's."""

        def __init__(self):
            super().__init__(logps=False)

    register_engine("counting")(Counting)
    trainer, _ = trained("counting")
    engine = trainer.rollouts.engine
    assert isinstance(engine, Counting)
    assert [call for call in engine.calls if call[0] in ("load_weights", "generate")] == [
        ("load_weights", 1), ("generate", 1), ("load_weights", 2), ("generate", 2),
    ]  # fmt: skip
    assert engine.weights.keys() == dict(trainer.model.named_parameters()).keys()


@pytest.mark.parametrize("name", SAME_AS)
def test_a_builtin_name_says_what_use_vllm_and_vllm_mode_say(name):
    use_vllm, mode = SAME_AS[name]
    args = RLOOConfig("out", use_cpu=True, rollout_engine=name)
    assert (args.use_vllm, args.vllm_mode) == (use_vllm, mode)


def _is_builtin(where):
    return (where if isinstance(where, str) else where.__module__).startswith("rloo_fast.")


def test_every_builtin_engine_has_a_name_in_the_configuration():
    builtin = {name for name, where in registry.ENGINES.items() if _is_builtin(where)}
    assert builtin == {*SAME_AS, "vllm_servers"}  # that is what several server addresses mean
    for name in builtin:
        assert issubclass(find_engine(name), RolloutEngine)
    streamed = {name for name in SAME_AS if not find_engine(name).shares_weights}
    assert streamed == {"vllm", "vllm_server"}
    assert {name for name in SAME_AS if find_engine(name).sleeps_in_process} == {"vllm"}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("transformers", {"use_vllm": True}),
        ("vllm", {"vllm_mode": "server"}),
        ("transformers", {"vllm_mode": "server"}),
    ],
    ids=str,
)
def test_fields_that_contradict_each_other_are_refused(name, fields):
    with pytest.raises(ValueError, match=f"rollout_engine='{name}' contradicts use_vllm="):
        RLOOConfig("out", use_cpu=True, rollout_engine=name, **fields)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("vlm", r"'vlm' is not known. Did you mean 'vllm'\? It is one of 'transformers', 'vllm', "),
        ("json:loads", "there is no subclass of RolloutEngine named 'loads' in json"),
        ("json:transformers", "no subclass of RolloutEngine named 'transformers'"),
        ("none.py:Engine", "could not be loaded: FileNotFoundError"),
        ("no_such_package.engine:Engine", "could not be loaded: ModuleNotFoundError"),
    ],
)
def test_what_is_no_engine_is_one_sentence(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_engine(name)


def test_vllms_settings_with_an_engine_that_does_not_read_them_are_refused():
    args = RLOOConfig("out", use_cpu=True, rollout_engine="my_engine.py:logged", use_vllm=True)
    rows = Dataset.from_dict({"prompt": ["w1"] * 8})
    with pytest.raises(ValueError, match="use_vllm=True has no effect with rollout_engine='my_eng"):
        RLOOTrainer(make_model(), len, args, rows, processing_class=make_tokenizer())
    for name in SAME_AS:
        assert find_engine(name).reads_vllm_settings == SAME_AS[name][0]


def test_an_unknown_engine_is_refused_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("rloo_fast.models.loading.load_policy", lambda *_: pytest.fail("loaded"))
    Path("rows.jsonl").write_text('{"prompt": "w1"}\n' * 8)
    make_model().save_pretrained("model")
    command = ["train", "--model_name_or_path", "model", "--dataset_name", "rows.jsonl",
               "--reward_funcs", "length", "--reward_kwargs", '{"length": {"target": 3}}',
               "--output_dir", "out", "--rollout_engine", "vlm"]  # fmt: skip
    assert cli.main(command) == 2
    assert "rollout_engine='vlm' is not known. Did you mean 'vllm'?" in capsys.readouterr().err


def test_two_engines_of_one_name_are_refused():
    class Mine(HFEngine):
        pass

    assert register_engine("mine")(Mine) is Mine
    assert register_engine("mine")(Mine) is Mine  # its file, run again
    assert find_engine("mine") is Mine
    for name in ("mine", "vllm"):
        with pytest.raises(ValueError, match=f"named '{name}' is registered already"):
            register_engine(name)(FakeEngine)
