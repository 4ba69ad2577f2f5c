"""Every sampling option that the installed transformers and vLLM have is in one table."""

from __future__ import annotations

import ast
import inspect
import textwrap

import pytest
from transformers import GenerationConfig, GenerationMixin

from rloo_fast.rollout.hf_sampling import WARPERS
from rloo_fast.weight_sync.sampling_options import CUTTING, NEUTRAL, RESHAPING, in_use
from tests.step.test_update import train
from tests.support.tiny import require_vllm
from tests.weight_sync.test_sampler_check import sample_with

CHANGES = CUTTING.keys() | RESHAPING.keys()


def read_of_config(tree: ast.AST) -> set[str]:
    """Attributes of `generation_config` that code reads."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "generation_config"
        and not node.attr.startswith("_")
    }


def processors() -> ast.Module:
    """The code in which generate() builds what changes its logits."""
    source = inspect.getsource(GenerationMixin._get_logits_processor)
    return ast.parse(textwrap.dedent(source))


def test_no_option_is_in_two_tables():
    assert not CUTTING.keys() & RESHAPING.keys()
    assert not CHANGES & NEUTRAL


def test_every_option_of_transformers_is_known():
    assert {n for n in vars(GenerationConfig()) if not n.startswith("_")} <= CHANGES | NEUTRAL


def test_what_transformers_makes_logits_processors_of_changes_the_distribution():
    read = read_of_config(processors())
    assert len(read) > 20
    neutral = {
        "temperature", "max_length", "use_cache", "renormalize_logits", "remove_invalid_values",
        "num_return_sequences",
    }  # fmt: skip
    assert read - CHANGES <= neutral


def test_every_warper_of_transformers_is_one_of_the_engine():
    sampling = next(
        node for node in ast.walk(processors())
        if isinstance(node, ast.If) and ast.unparse(node.test) == "generation_config.do_sample"
    )  # fmt: skip
    read = set().union(*map(read_of_config, sampling.body))
    assert read - {"num_beams"} == {name for name, *_ in WARPERS}


@pytest.mark.vllm
@pytest.mark.slow
def test_every_option_of_vllm_is_known():
    require_vllm()
    from vllm import SamplingParams
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    fields = {*SamplingParams.__struct_fields__, *CompletionRequest.model_fields}
    assert {name for name in fields if not name.startswith("_")} <= CHANGES | NEUTRAL


def test_an_option_of_a_newer_release_counts_until_it_is_known():
    cutting, reshaping = in_use({"temperature": 1.0}, {"new_penalty": 0.5, "new_cache": None})
    assert (cutting, reshaping) == ({}, {"new_penalty": 0.5})


@pytest.mark.parametrize(
    "option",
    [
        {"forced_eos_token_id": 1},
        {"forced_bos_token_id": 9},
        {"begin_suppress_tokens": [9, 10, 11]},
        {"encoder_no_repeat_ngram_size": 2},
        {"remove_invalid_values": True, "renormalize_logits": True},
        {"sequence_bias": [[[9], 4.0]]},
    ],
    ids=lambda option: next(iter(option)),
)
def test_a_run_with_the_option_is_no_mismatch(option, tmp_path, caplog):
    trainer = train(
        tmp_path, max_steps=2, generation_kwargs=option,
        before=lambda trainer: sample_with(trainer, trainer.model),
    )  # fmt: skip
    assert trainer.state.global_step == 2
    said = [r.getMessage() for r in caplog.records if "another distribution" in r.getMessage()]
    assert len(said) == len(option.keys() & CHANGES)
