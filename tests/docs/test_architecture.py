"""docs/architecture.md against the code: the walk, the tree, the layers, the records."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer, records
from rloo_fast.objective.advantages import AdvantageMaker
from rloo_fast.rollout import register_engine, registry
from tests.support.fake_engine import FakeEngine
from tests.support.pages import code_blocks
from tests.support.paths import ROOT
from tests.support.tiny import make_model, make_tokenizer

PAGE = (ROOT / "docs" / "architecture.md").read_text()
FOLDERS = {
    path.parent.name for path in (ROOT / "rloo_fast").glob("*/*") if path.suffix in (".py", ".yaml")
}
FILES = {
    "trainer",
    "transformers_hooks",
    "trl_names",
    "records",
    "record_rows",
    "record_trajectories",
}


class Stop(NamedTuple):
    """A line of the walk."""

    path: Path  # below the root
    function: str
    caller: str  # a file below rloo_fast

    @property
    def folder(self) -> str:
        """rollout of rloo_fast/rollout/cycle.py."""
        return self.path.parts[1]

    @property
    def code(self):
        parts = self.path.with_suffix("").parts
        found = importlib.import_module(".".join(parts[parts[0] == "kernels" :]))
        for name in self.function.split("."):
            found = getattr(found, name)
        return inspect.unwrap(found).__code__


LINE = r"^\| \[[^]]+\]\(\.\./(\S+)\) \| `(\S+)` \|.*\| `(\S+)` \|$"
WALK = [Stop(Path(path), *rest) for path, *rest in re.findall(LINE, PAGE, re.MULTILINE)]


def test_the_walk_never_returns_to_a_folder():
    folders = [stop.folder for stop in WALK]
    entered = [f for i, f in enumerate(folders) if i == 0 or folders[i - 1] != f]
    assert entered == [
        "data", "rollout", "rewards", "batching", "objective", "policy", "rloo_kernels",
        "weight_sync",
    ]  # fmt: skip


@pytest.fixture
def traced(tmp_path, monkeypatch):
    """The lines of the walk in the order in which two steps of a run first reach them, after the
    sync of the weights that it starts with."""
    monkeypatch.setattr(registry, "ENGINES", dict(registry.ENGINES))
    register_engine("fake")(FakeEngine)
    args = RLOOConfig(
        str(tmp_path), rollout_engine="fake", per_device_train_batch_size=4, max_steps=2, beta=0.0,
        max_completion_length=5, layout="shared_prefix", logp_diff_stop=0, logp_diff_warn=0,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=False, logging_steps=1,
    )  # fmt: skip
    trainer = RLOOTrainer(
        make_model(),
        lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
        args,
        Dataset.from_dict({"prompt": ["w1 w2", "w3", "w4 w5", "w6"]}),
        processing_class=make_tokenizer(),
    )
    # the layout is chosen by a trial run, before the first step
    trainer.update.planner.layout_name = "shared_prefix"
    stops, calls = {stop.code: stop for stop in WALK}, []

    def note(frame, event, _):
        if event == "call" and frame.f_code in stops:
            stop = stops[frame.f_code]
            calls.append(stop)
            while frame and frame.f_code.co_filename != str(ROOT / "rloo_fast" / stop.caller):
                frame = frame.f_back
            assert frame, f"{stop} was called by another file"

    sys.setprofile(note)
    try:
        trainer.train()
    finally:
        sys.setprofile(None)
    sampled = next(i for i, stop in enumerate(calls) if stop.path.name == "engine.py")
    calls = [s for i, s in enumerate(calls) if i >= sampled or s.function != "weight_buckets"]
    return list(dict.fromkeys(calls))


def test_a_step_reaches_the_files_in_the_order_of_the_walk(traced):
    assert len(WALK) == 19
    assert [stop.function for stop in traced] == [stop.function for stop in WALK]


def test_the_tree_has_every_folder_and_no_other():
    (tree,) = [code for code in code_blocks(PAGE, "text") if code.startswith("rloo_fast/\n")]
    own = tree.split("kernels/")[0]
    named = [name for line in own.splitlines()[1:] for name in re.findall(r"\b(\w+)/ ", line[:25])]
    assert sorted(named) == sorted(FOLDERS)
    assert {*re.findall(r"^  (\w+)\.py", own, re.MULTILINE)} == FILES
    numbers = dict(re.findall(r"^  (\w+)/ +(\d)  ", own, re.MULTILINE))
    assert list(numbers.values()) == [str(i) for i in range(1, 9)]
    for folder, number in numbers.items():
        module = importlib.import_module(f"rloo_fast.{folder}")
        assert (module.__doc__ or "").startswith(f"Stage {number}: ")


def test_the_layers_have_every_folder_once():
    (layers,) = [code for code in code_blocks(PAGE, "text") if code.startswith("cli\n")]
    assert sorted(re.findall(r"\w+", layers)) == sorted((FOLDERS - {"recipes"}) | FILES)


def test_the_records_it_names_are_there():
    named = {*re.findall(r"`(\w*(?:Batch|Plan|Result|Rollout|Prompt))`", PAGE)}
    assert {"Prompt", "GenerationBatch", "PreparedBatch", "StepPlan", "StepResult"} <= named
    for name in named:
        assert hasattr(records, name)


def test_the_cases_of_advantages_are_methods():
    table = PAGE.split("## Where advantages are made")[1].split("\n## ")[0]
    methods = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert len(methods) == 3
    assert all(callable(getattr(AdvantageMaker, name)) for name in methods)
