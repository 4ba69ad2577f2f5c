"""Checkpoints under DDP, FSDP2 and DeepSpeed: exact resumes, other numbers of processes, weights
that transformers loads, saves that fail.

    python -m tests.end_to_end.test_resume_engines      prints what was resumed, and what equals
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from tests.support.launch import run_worker_processes
from tests.support.resume_worker import MOVING, SAVED, STEPS, make_trainer, resumed
from tests.support.tiny import make_model

LORA = {"lora": True}
RENAMED = {"policy": "gpt_neox"}  # whose lm_head has another name in a checkpoint
EXACT: dict[str, dict[str, Any]] = {
    "DDP full": {"engine": "ddp", **MOVING, **RENAMED},
    "DDP LoRA": {"engine": "ddp", **LORA},
    "FSDP2 full": {"engine": "fsdp2", **MOVING, **RENAMED},
    "FSDP2 LoRA": {"engine": "fsdp2", **LORA},
    "FSDP2 bf16, tied": {"engine": "fsdp2", "bf16": True, "policy": "tied"},
    "ZeRO-1 full": {"engine": "zero1"},
    "ZeRO-2 LoRA": {"engine": "zero2", **LORA},
    "ZeRO-3 full": {"engine": "zero3", **MOVING, **RENAMED},
    "ZeRO-3 LoRA": {"engine": "zero3", "lora": "passed in"},
    "ZeRO-3 bf16, tied": {"engine": "zero3", "bf16": True, "policy": "tied"},
}
# saved by two processes, resumed by another number of them
RESHARDED: dict[str, dict[str, Any]] = {
    "DDP full, moved": {"engine": "ddp", **MOVING},
    "FSDP2 full, moved": {"engine": "fsdp2", **MOVING},
    "FSDP2 LoRA, moved": {"engine": "fsdp2", **LORA, "disable_dropout": True},
}
UNLUCKY = {f"{name} unlucky": EXACT[name] for name in ("FSDP2 full", "ZeRO-3 full")}
TERMINATED = {
    f"{name} terminated": {**EXACT[name], "whole": name} for name in ("FSDP2 full", "ZeRO-3 LoRA")
}
SPLIT = {
    "FSDP2": EXACT["FSDP2 full"],
    "ZeRO-1": EXACT["ZeRO-1 full"],
    "ZeRO-3": EXACT["ZeRO-3 full"],
}
MADE_UP = {f"{e} made up": {**case, "whole": f"{e} full"} for e, case in SPLIT.items()}
ELSEWHERE = {f"{e} elsewhere": {**case, "whole": f"{e} full"} for e, case in SPLIT.items()}
BEST = {f"{name} best": {"engine": e} for name, e in (("FSDP2", "fsdp2"), ("ZeRO-3", "zero3"))}


def launch(out: Path, processes: int, jobs: list[Any]) -> dict[str, dict[str, bool]]:
    """Facts of every job, by its name."""
    done = run_worker_processes("resume_worker", str(out), json.dumps(jobs), processes=processes)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((out / "facts.json").read_text())


def two_processes(out: Path) -> dict[str, dict[str, bool]]:
    make_model().save_pretrained(out / "qwen2")
    make_model(tie_word_embeddings=True).save_pretrained(out / "tied")
    neox = GPTNeoXConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=None, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    GPTNeoXForCausalLM(neox).save_pretrained(out / "gpt_neox")
    kinds = {
        "exact": EXACT, "saved": RESHARDED, "unlucky": UNLUCKY, "terminated": TERMINATED,
        "best": BEST, "made_up": MADE_UP, "elsewhere": ELSEWHERE,
    }  # fmt: skip
    jobs = [(name, job, case) for job, cases in kinds.items() for name, case in cases.items()]
    return launch(out, 2, jobs)


def four_processes(out: Path) -> dict[str, dict[str, bool]]:
    smaller = {"per_device_train_batch_size": 1}
    jobs = [(name, "resumed", {**case, **smaller}) for name, case in RESHARDED.items()]
    why = "was saved with ZeRO-3 by 2 processes and cannot be resumed by 4: launch 2, or give"
    refused = {"engine": "zero3", "why": why, **smaller}
    return launch(out, 4, [*jobs, ("ZeRO-3 full", "refused", refused)])


def one_process(out: Path) -> dict[str, bool]:
    return resumed(out / "DDP full, moved", engine="ddp", per_device_train_batch_size=4, **MOVING)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def facts(out):
    return two_processes(out)


@pytest.fixture(scope="module")
def facts_of_four(out, facts):
    return four_processes(out)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", EXACT)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(facts, case):
    assert facts[case] == dict.fromkeys(facts[case], True)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("saved", ["final", f"whole/checkpoint-{STEPS}"])
def test_transformers_loads_the_weights_that_were_trained(facts, out, case, saved):
    directory, trained = out / case / saved, torch.load(out / case / "weights.pt")
    if "LoRA" in case:
        check_adapters(directory, out / "qwen2", trained)
        return
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")

    architecture = "GPTNeoX" if EXACT[case].get("policy") == "gpt_neox" else "Qwen2"
    assert loaded.config.architectures == [f"{architecture}ForCausalLM"]
    assert loaded.state_dict().keys() >= trained.keys()
    assert all(torch.equal(loaded.state_dict()[name], trained[name]) for name in trained)


def check_adapters(directory: Path, base: Path, trained: dict[str, torch.Tensor]) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(directory))
    loaded = dict(model.named_parameters())
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    assert all("lora_" in name for name in load_file(directory / "adapter_model.safetensors"))
    assert not (directory / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", [*MADE_UP, *ELSEWHERE])
def test_damaged_and_hostile_checkpoints_are_refused_and_run_nothing(facts, case):
    assert facts[case] == dict.fromkeys(facts[case], True)
    assert len(facts[case]) >= (2 if "elsewhere" in case else 80)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", [*UNLUCKY, *TERMINATED, *BEST])
def test_saves_that_fail_sigterm_and_the_best_checkpoint(facts, case):
    assert facts[case] == dict.fromkeys(facts[case], True)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", [*RESHARDED, "ZeRO-3 full"])
def test_other_processes_go_on_to_rounding_or_are_refused(facts_of_four, case):
    assert facts_of_four[case] == dict.fromkeys(facts_of_four[case], True)


@pytest.mark.slow
@pytest.mark.distributed
def test_one_process_goes_on_with_the_run_of_two(facts, out):
    assert one_process(out) == {"weights": True, "logs": True}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("FSDP2 full", "was saved with FSDP2 and cannot be resumed with DDP"),
        ("ZeRO-3 full", "was saved with ZeRO-3 and cannot be resumed with DDP"),
        ("DDP full", "holds completions still to be used, dealt out to 2 processes"),
    ],
)
def test_what_one_process_cannot_resume_is_refused(facts, out, tmp_path, case, why):
    make_model().save_pretrained(tmp_path / "qwen2")
    trainer = make_trainer(tmp_path / "case" / "run", "ddp", per_device_train_batch_size=4)

    with pytest.raises(ValueError, match=why):
        trainer.train(str(out / case / "whole" / f"checkpoint-{SAVED}"))

    assert trainer.optimizer is None


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        two = two_processes(Path(folder))
        four = four_processes(Path(folder))
        one = one_process(Path(folder))
    half_used = f"step {SAVED}, half of the completions used"
    table = [(name, half_used, "2", "bit for bit", two[name]) for name in EXACT]
    for name in RESHARDED:
        table.append((name, "step 4, no completions wait", "4", "to rounding", four[name]))
    table.append(("DDP full, moved", "step 4, no completions wait", "1", "to rounding", one))
    table.append(("ZeRO-3 full", half_used, "4", "", four["ZeRO-3 full"]))
    for name in (*UNLUCKY, *TERMINATED, *BEST):
        table.append((name, "", "2", "", two[name]))
    print(f"{'saved by 2 processes':23} {'at':33} {'resumed by':11} result")
    for name, saved, processes, how, facts in table:
        held = [fact if holds else f"NOT {fact}" for fact, holds in facts.items()]
        print(f"{name:23} {saved:33} {processes:11} {how + ': ' * bool(how)}{', '.join(held)}")


if __name__ == "__main__":
    main()
