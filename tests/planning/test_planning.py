"""Memory and traffic on paper equal what two gloo processes hold and send, byte for byte."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rloo_kernels.lm_head.piece import PIECE_BYTES, PIECE_BYTES_HALF
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

from rloo_fast import cli
from rloo_fast.cli import plan as cli_plan
from rloo_fast.offload import engine_room as memory
from rloo_fast.planning import memory as scaling
from rloo_fast.planning.memory import GIB, Setup, held, in_backward
from rloo_fast.planning.shapes import SHAPES, find_shape
from rloo_fast.planning.traffic import NETWORK, NVLINK, traffic, transfer
from tests.support.launch import run_worker_processes

TINY = LlamaConfig(
    hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=160, tie_word_embeddings=False,
)  # fmt: skip
BASE = {"lora": 0, "micro_batches": 2, "reduce_every_micro_batch": True, "live": 0}
CASES = {
    "FSDP2": {"engine": "fsdp2"},
    "FSDP2, gradients reduced once": {"engine": "fsdp2", "reduce_every_micro_batch": False},
    "FSDP2, LoRA": {"engine": "fsdp2", "lora": 8},
    "ZeRO-3": {"engine": "zero3"},
    "ZeRO-3, LoRA": {"engine": "zero3", "lora": 8},
    "ZeRO-3, as DeepSpeed sets it": {"engine": "zero3", "live": 10**9},
    "ZeRO-2": {"engine": "zero2"},
    "DDP": {"engine": "ddp", "micro_batches": 1},
}
EXACT = ("FSDP2", "FSDP2, gradients reduced once", "FSDP2, LoRA", "ZeRO-3", "ZeRO-2", "DDP")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(TINY).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def measured(tiny):
    """{case: {"held": {what: bytes}, "payload": {phase: {collective: bytes}}}} of rank 0."""
    cases = json.dumps({name: BASE | case for name, case in CASES.items()})
    out = tiny / "measured.json"
    done = run_worker_processes("scaling_worker", str(out), str(tiny), cases)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def setup_of(case: str, tiny: Path) -> Setup:
    fields = {**BASE, **CASES[case]}
    del fields["live"]
    targets = ("q_proj", "v_proj")  # of the worker
    shape = find_shape(str(tiny))
    return Setup(shape, gpus=2, tokens=12, vllm_share=0.0, lora_targets=targets, **fields)


def payloads(setup: Setup, phases: tuple[str, ...]) -> dict[str, float]:
    """Bytes of every collective's whole tensors in these phases, by the formulas."""
    found: dict[str, float] = {}
    for move in traffic(setup):
        if move.what in phases:
            found[move.collective] = found.get(move.collective, 0) + move.payload
    return found


UPDATE = ("forward", "backward", "gradients", "updated weights")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_what_a_process_holds_is_what_the_formulas_say(case, measured, tiny):
    setup, got = setup_of(case, tiny), dict(measured[case]["held"])
    said = held(setup)
    if not setup.reduce_every_micro_batch:
        whole = "whole gradients, not reduced yet"
        said[whole] = in_backward(setup)[whole]
    if "reference" not in got:
        said.pop("reference", None)
    if setup.engine == "zero2":  # a matrix that the border between two processes cuts stays whole
        cut = got.pop("gradients") - said.pop("gradients")
        assert 0 <= cut < setup.width * setup.shape.largest_matrix
    assert got == said


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", EXACT)
def test_what_an_update_sends_is_what_the_formulas_say(case, measured, tiny):
    assert measured[case]["payload"]["update"] == payloads(setup_of(case, tiny), UPDATE)


@pytest.mark.slow
@pytest.mark.distributed
def test_zero3_sends_at_most_what_the_formulas_say(measured, tiny):
    for case in ("ZeRO-3, LoRA", "ZeRO-3, as DeepSpeed sets it"):
        setup = setup_of(case, tiny)
        got, said = measured[case]["payload"]["update"], payloads(setup, UPDATE)
        assert got["reduce-scatter"] == said["reduce-scatter"]
        once = payloads(setup, ("forward",))["all-gather"]
        assert once / setup.micro_batches <= got["all-gather"] < said["all-gather"], case


@pytest.mark.slow
@pytest.mark.distributed
def test_a_reference_that_is_split_is_gathered_but_for_its_head_with_every_micro_batch(
    measured, tiny
):
    phase = "reference"
    assert measured["FSDP2"]["payload"][phase] == payloads(setup_of("FSDP2", tiny), (phase,))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", ["FSDP2", "FSDP2, LoRA", "ZeRO-3", "ZeRO-3, LoRA"])
def test_the_engine_is_sent_one_gather_of_the_policy(case, measured, tiny):
    phase = "weights to the engine"
    assert measured[case]["payload"][phase] == payloads(setup_of(case, tiny), (phase,))


# Without processes


def test_parameters_of_the_shapes_are_those_of_transformers(tmp_path):
    """Every number of a shape, against the model built on the meta device from such a config."""
    sizes = {
        "7b": (Qwen2Config, 3584, 28, 28, 4, 18944, 152064),
        "32b": (Qwen2Config, 5120, 64, 40, 8, 27648, 152064),
        "70b": (LlamaConfig, 8192, 80, 64, 8, 28672, 128256),
    }
    for name, (config, hidden, layers, heads, kv_heads, intermediate, vocab) in sizes.items():
        config(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, intermediate_size=intermediate, vocab_size=vocab,
            tie_word_embeddings=False,
        ).save_pretrained(tmp_path / name)  # fmt: skip
        assert find_shape(str(tmp_path / name)) == SHAPES[name]
    published = {"7b": 7_615_616_512, "32b": 32_763_876_352, "70b": 70_553_706_496}
    assert {name: shape.params for name, shape in SHAPES.items()} == published


def test_tied_embeddings_are_counted_and_gathered_once(tmp_path):
    fields = {**TINY.to_dict(), "tie_word_embeddings": True, "head_dim": 32}
    fields = {k: v for k, v in fields.items() if k in ("hidden_size", "num_hidden_layers",
              "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
              "tie_word_embeddings", "head_dim")}  # fmt: skip
    config = Qwen3Config(**fields)
    config.save_pretrained(tmp_path)
    shape = find_shape(str(tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.params == sum(p.numel() for p in model.parameters())
    assert (shape.embeddings, shape.tail) == (0, 160 * 64 + 64)
    assert shape.head_size == 32


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_layer_keeps_what_the_formula_says(dtype, tiny):
    """Storages that autograd saves, weights and what all layers share left out."""

    def saved(layers: int) -> int:
        config = LlamaConfig(**{**TINY.to_diff_dict(), "num_hidden_layers": layers})
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32
        )
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.model(input_ids=torch.arange(33)[None])
        return sum(storage.nbytes() for storage in kept.values())

    setup = Setup(shape=find_shape(str(tiny)), gpus=1, dtype=dtype)
    assert saved(3) - saved(2) == 33 * scaling.layer_bytes(setup)


def test_the_loss_holds_a_piece_of_logits_and_a_float32_sum_of_the_heads_gradient():
    setup = Setup(shape=SHAPES["7b"], gpus=8, tokens=16384)
    pieces = {2: PIECE_BYTES_HALF, 4: PIECE_BYTES[torch.float32]}
    assert pieces == scaling.PIECE
    at_loss, head = scaling.at_the_loss(setup), 152064 * 3584
    assert at_loss["logits of a piece"] == PIECE_BYTES_HALF
    assert at_loss["lm_head's gradient"] == 6 * head
    few = scaling.at_the_loss(replace(setup, tokens=1024))
    assert few["logits of a piece"] == 1024 * 152064 * 2
    assert few["lm_head's gradient"] == 2 * head
    assert "lm_head's gradient" not in scaling.at_the_loss(replace(setup, lora=16))


def test_the_trainers_reserve_is_the_plans():
    assert scaling.RESERVE == memory.RESERVE


def test_ring_and_network_shares_of_a_collective():
    move = transfer("weights", "all-gather", 64e9, 64, 8)
    assert move.sent == 63e9
    assert move.network == 7e9  # 56 of 64 parts come from other nodes, an eighth to each GPU
    assert move.seconds == max(56e9 / NVLINK, 7e9 / NETWORK)
    assert transfer("gradients", "all-reduce", 64e9, 64, 8).sent == 2 * 63e9
    assert transfer("weights", "all-gather", 64e9, 8, 8).network == 0
    assert transfer("weights", "all-gather", 64e9, 1, 8).sent == 0


def test_hybrid_sharding_gathers_inside_a_node_and_reduces_across():
    flat = Setup(shape=SHAPES["7b"], gpus=64)
    hybrid = replace(flat, hybrid=True)
    moves = {move.what: move for move in traffic(hybrid)}
    assert all(m.network == 0 for what, m in moves.items() if "across" not in what)
    shard = 4 * flat.trained / 8 * flat.micro_batches
    assert moves["gradients, across nodes"].network == 2 * 7 / 8 * shard
    assert moves["gradients, across nodes"].nvlink == 0
    assert held(hybrid)["optimizer state"] == 8 * held(flat)["optimizer state"]


def test_a_whole_run_on_one_gpu_sends_nothing():
    assert traffic(Setup(shape=SHAPES["7b"], gpus=1)) == []


def test_the_cache_of_an_engine_is_split_as_far_as_there_are_key_value_heads():
    setup = Setup(shape=SHAPES["70b"], gpus=64, tp=4, vllm_share=0.5, gpu_memory_gib=100)
    assert scaling.cache_bytes(setup) == 2 * 80 * 8 * 128 * 2 / 4
    assert scaling.cache_bytes(replace(setup, tp=16)) == 2 * 80 * 8 * 128 * 2 / 8
    assert scaling.engine_cache(setup) == 50 * GIB - 2 * 70_553_706_496 / 4


def test_lora_counts_adapters_of_the_targets_only():
    setup = Setup(shape=SHAPES["7b"], gpus=8, lora=16, lora_targets=("q_proj", "v_proj"))
    assert setup.trained == 28 * 16 * (3584 + 3584 + 3584 + 512)
    assert not setup.has_reference


# The command


def run_plan(capsys, *options: str) -> str:
    assert cli.main(["plan", *options]) == 0
    return capsys.readouterr().out


def test_the_lines_of_a_plan_add_up(capsys):
    out = run_plan(capsys, "--model", "70b", "--gpus", "64")
    update, rollout = out.split("Update:")[1].split("Rollout:")
    lines = [line for line in update.splitlines()[1:] if line.startswith("  ")]
    figures = {line[2:36].strip(): float(line[36:45]) for line in lines}
    total = figures.pop("in use, at most")
    kept = sum(size for name, size in figures.items() if not name.startswith("loss:"))
    assert kept == pytest.approx(total, abs=0.1)
    assert "70,553,706,496 parameters" in out
    assert out.splitlines()[-1].startswith(f"Fits: {139 - total:.1f} GiB to spare in the update")
    moved = rollout.split("moved to the host")[1].splitlines()[0]
    assert float(moved.split()[0]) == 0


def test_a_run_too_large_names_single_changes_that_are_enough(capsys):
    out = run_plan(capsys, "--model", "70b", "--gpus", "8", "--no-checkpointing")
    assert "Does not fit" in out
    setup = Setup(shape=SHAPES["70b"], gpus=8, checkpointing=True, vllm_share=0.0)
    for said, change in {"--gpus 16": {"gpus": 16}, "--lora 16": {"lora": 16}}.items():
        changed = replace(setup, **change)
        assert (said in cli_plan._verdict(setup)) == cli_plan.fits(changed), said


def test_an_engine_whose_share_is_smaller_than_its_weights_does_not_fit(capsys):
    small = ("--model", "70b", "--gpus", "8", "--lora", "16", "--tp", "1")
    out = run_plan(capsys, *small)
    assert "missing in the rollout" in out
    assert "--tp 4" in out.splitlines()[-1]
    assert "Fits" in run_plan(capsys, *small[:-1], "4")


def test_several_plans_are_a_table_and_a_csv(capsys, tmp_path):
    file = tmp_path / "plans.csv"
    several = ("--model", "7b,70b", "--gpus", "8,64", "--engine", "fsdp2,zero3")
    lines = run_plan(capsys, *several, "--csv", str(file)).splitlines()
    assert len(lines) == 2 + 8
    rows = list(csv.DictReader(file.open()))
    assert [(r["model"], r["gpus"], r["engine"]) for r in rows[:2]] == [
        ("7b", "8", "fsdp2"), ("7b", "8", "zero3"),
    ]  # fmt: skip
    setup = Setup(shape=SHAPES["7b"], gpus=8)
    assert int(rows[0]["update"]) == round(scaling.update_peak(setup))
    assert f"{int(rows[0]['update']) / GIB:.1f}" in lines[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "71b", "--gpus", "8"], "one of 7b, 32b, 70b, .* got '71b'. Did you mean 7"),
        (["--model", "7b", "--gpus", "0"], "gpus must be >= 1, got 0"),
        (["--model", "7b", "--gpus", "many"], "whole number, got 'many'"),
        (["--model", "7b", "--gpus", "12"], "gpus_per_node=8 or a multiple of it, got 12"),
        (["--model", "7b", "--gpus", "8", "--engine", "fsdp"], "fsdp2, zero3, .* got 'fsdp'"),
        (["--model", "7b", "--gpus", "8", "--hybrid"], "hybrid .* fsdp2 on 8 GPUs"),
        (["--model", "7b", "--gpus", "8", "--tp", "3"], "tp must divide .* got 3"),
        (["--model", "7b", "--gpus", "8", "--vllm_share", "1"], r"vllm_share must be in \[0, 1\)"),
        (["--model", "7b", "--gpus", "8", "--lora", "8", "--lora_targets", "x"], "q_.* got x"),
        (["--model", "7b", "--gpus", "8", "--beta", "-1"], "beta must be >= 0"),
        (["--model", "7b", "--gpus", "8", "--csv", "no/such/file"], "no/such/file: No such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_sentence(options, message, capsys):
    assert cli.main(["plan", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rloo-fast: error: ")
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error


def test_a_plan_imports_no_torch():
    code = (
        "import sys; from rloo_fast.cli import main; "
        "main(['plan', '--model', '7b', '--gpus', '8']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


SMALL = {
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "intermediate_size": 64, "vocab_size": 50},
    "phi3": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 50,
             "pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
            "word_embed_proj_dim": 32, "vocab_size": 50},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
               "vocab_size": 50},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 50,
                "attention_types": [[["global", "local"], 1]]},
    "deepseek_v3": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                    "num_key_value_heads": 4, "intermediate_size": 64, "vocab_size": 50,
                    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
                    "n_group": 2, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
                    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
                    "first_k_dense_replace": 1},
    "qwen3_moe": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "intermediate_size": 64, "moe_intermediate_size": 16,
                  "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 50},
    "jamba": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 50,
              "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
}  # fmt: skip


@pytest.mark.parametrize("family", SMALL)
def test_families_of_all_kinds_are_planned_with_the_adapters_of_train(family, tmp_path, capsys):
    """Those of `train --use_peft`: on every linear layer but the head, whatever it is called."""
    config = CONFIG_MAPPING[family](**SMALL[family])
    config.save_pretrained(tmp_path)
    words = ["plan", "--model", str(tmp_path), "--gpus", "8", "--gpu_memory_gib", "0.5"]
    assert cli.main([*words, "--engine", "ddp"]) == 0  # does not fit: every remedy is tried
    assert "Does not fit" in capsys.readouterr().out
    assert cli.main([*words, "--lora", "8"]) == 0
    model = AutoModelForCausalLM.from_config(config)
    shape = find_shape(str(tmp_path))
    assert shape.params == model.num_parameters()
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert Setup(shape=shape, gpus=8, lora=8).trained == trained


def test_a_model_without_attention_and_one_that_is_none_are_a_sentence(tmp_path, capsys):
    CONFIG_MAPPING["mamba"](hidden_size=32, num_hidden_layers=2, vocab_size=50).save_pretrained(
        tmp_path
    )
    words = ["plan", "--model", str(tmp_path), "--gpus", "8"]
    assert cli.main(words) == 2
    assert "number of attention heads" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "no_such"}')
    assert cli.main(words) == 2
    assert "no causal language model can be made of it" in capsys.readouterr().err


def test_a_model_that_peft_adapts_in_part_alone_is_planned_whole(tmp_path, capsys):
    """Where Mamba's layers are among the linear ones, their kernels would not see the adapters."""
    config = CONFIG_MAPPING["nemotron_h"](
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        layers_block_type=["mamba", "attention", "mlp"], intermediate_size=64, vocab_size=50,
        mamba_num_heads=4, mamba_head_dim=16, n_groups=1, ssm_state_size=8,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    words = ["plan", "--model", str(tmp_path), "--gpus", "8", "--gpu_memory_gib", "0.5"]
    assert cli.main([*words, "--engine", "ddp"]) == 0
    assert "--lora" not in capsys.readouterr().out  # no remedy that would be refused
    assert cli.main([*words, "--lora", "8"]) == 2
    assert "name some by --lora_targets" in capsys.readouterr().err
    assert cli.main([*words, "--lora", "8", "--lora_targets", "q_proj,v_proj"]) == 0
