"""TRL 1.16's own trainers with and without our log-probs: same model, completions and rewards.

`python -m tests.integrations.test_trl` prints the table: case -> largest relative difference of
the loss, the gradients, the weights and the logged entropy over the steps that were run.
"""

from __future__ import annotations

import gc
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig

import rloo_fast.integrations._ops as ops
import rloo_fast.integrations.trl as fast_trl
from tests.parity.test_trl import MAX_NEW, Injected, Recorder, first_reward, relative
from tests.support.tiny import make_model, make_tokenizer

trl = pytest.importorskip("trl")
TOLERANCE = 1e-5
# two bf16 results, each up to 0.055 from the fp32 ones (as far as TRL's own gradients are)
BF16_BOUND = 0.1
BF16 = dict(dtype="bfloat16")
STEPS = 2
TINY = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
TINY |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
TINY |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.2)


def phi() -> Any:
    """A head with a bias."""
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**TINY, resid_pdrop=0.0))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def gemma2() -> Any:
    """Soft-capped logits and tied embeddings; the cap is low enough to bend them."""
    config = transformers.Gemma2Config(
        **TINY, head_dim=8, sliding_window=16, final_logit_softcapping=2.0
    )
    return transformers.Gemma2ForCausalLM(config)


def granite() -> Any:
    """Logits divided by a constant."""
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**TINY, logits_scaling=0.5))


def tied() -> Any:
    return make_model(tie_word_embeddings=True)


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

# case -> trainer, settings; "make" builds the model, "peft" adapts it, "bound" replaces TOLERANCE
CASES: dict[str, tuple[str, dict]] = {
    "RLOO": ("RLOO", dict(beta=0.0)),
    "RLOO, KL penalty": ("RLOO", dict(beta=0.3, num_generations=4)),
    "RLOO, temperature 0.6, num_iterations 2": ("RLOO", dict(temperature=0.6, num_iterations=2)),
    "RLOO, head with a bias (Phi)": ("RLOO", dict(make=phi)),
    "RLOO, soft-cap, tied weights (Gemma 2)": ("RLOO", dict(make=gemma2)),
    "RLOO, logit scale (Granite)": ("RLOO", dict(make=granite, temperature=1.7)),
    "RLOO, LoRA": ("RLOO", dict(peft=LORA, beta=0.1)),
    "RLOO, bf16 autocast": ("RLOO", dict(bf16=True, bound=BF16_BOUND)),
    "GRPO": ("GRPO", dict()),
    "GRPO, KL penalty, accumulation 2": ("GRPO", dict(beta=0.2, gradient_accumulation_steps=2)),
    "GRPO, tied weights": ("GRPO", dict(make=tied)),
    "GRPO, entropy bonus": ("GRPO", dict(entropy_coef=0.5, temperature=1.3)),
    "GRPO, entropy bonus, soft-cap": ("GRPO", dict(entropy_coef=0.5, make=gemma2)),
    "GRPO, entropy bonus, bias": ("GRPO", dict(entropy_coef=0.5, make=phi)),
    "GRPO, entropy bonus, LoRA": ("GRPO", dict(entropy_coef=0.5, peft=LORA)),
    "GRPO, high-entropy tokens only": ("GRPO", dict(top_entropy_quantile=0.5)),
    "GRPO, bf16 weights, fp32 head": (
        "GRPO",
        dict(model_init_kwargs=BF16, cast_lm_head_to_fp32=True, bound=BF16_BOUND),
    ),
}


class InjectedForGRPO(Injected):
    """GRPO's generation takes num_generations too and returns the sampler's log-probs."""

    def for_trl(self, prompt_ids, images, multimodal_fields, num_generations=None):
        ids = self.ids(prompt_ids)
        return ids if num_generations is None else (ids, None)


def train(kind: str, model_dir: Path, out: Path, case: dict) -> SimpleNamespace:
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_generations": 2,
        "max_completion_length": MAX_NEW,
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        **case,
    }
    peft = settings.pop("peft", None)
    for ours in ("make", "bound"):
        settings.pop(ours, None)
    transformers.set_seed(0)  # of the adapter's weights
    recorder, losses = Recorder(), []
    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(model_dir),
        reward_funcs=[first_reward],
        args=getattr(trl, f"{kind}Config")(output_dir=str(out), **settings),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 7} w3" for i in range(16)]}),
        processing_class=make_tokenizer(),
        peft_config=peft,
        callbacks=[recorder],
    )
    trainer._generate_single_turn = InjectedForGRPO(settings["num_generations"]).for_trl
    compute_loss = trainer.compute_loss

    def compute_and_keep_loss(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        losses.append(float(loss.detach()))  # the log's is rounded
        return loss

    trainer.compute_loss = compute_and_keep_loss
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    entropies = [log["entropy"] for log in recorder.logs]
    scale = max(log.get("reward_std", 0.0) for log in recorder.logs)
    return SimpleNamespace(
        losses=losses,
        gradients=recorder.gradients,
        weights=weights,
        entropies=entropies,
        scale=max(scale, *map(abs, losses)),  # advantages cancel: measured against their size
    )


class Counter:
    """A function, and how often it was called."""

    def __init__(self, function: Callable):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def differences(kind: str, case: dict, tmp: Path) -> tuple[dict[str, float], int]:
    """(quantity -> largest relative difference between patched and plain TRL, calls of our op)."""
    torch.manual_seed(0)
    case.get("make", make_model)().save_pretrained(tmp / "model")
    make_tokenizer().save_pretrained(tmp / "model")
    theirs = train(kind, tmp / "model", tmp / "plain", case)
    counter = Counter(ops.linear_logprob)
    with pytest.MonkeyPatch.context() as patch, fast_trl.patched():
        patch.setattr(ops, "linear_logprob", counter)
        ours = train(kind, tmp / "model", tmp / "patched", case)
    assert len(ours.gradients) == len(theirs.gradients) == STEPS

    def largest(a: list[float], b: list[float], scale: float) -> float:
        return max(abs(x - y) / scale for x, y in zip(a, b, strict=True))

    found = {
        "loss": largest(ours.losses, theirs.losses, theirs.scale),
        "gradients": max(map(relative, ours.gradients, theirs.gradients)),
        "weights": relative(ours.weights, theirs.weights),
        "entropy": largest(ours.entropies, theirs.entropies, max(theirs.entropies)),
    }
    return found, counter.calls


@pytest.mark.parametrize(("kind", "case"), CASES.values(), ids=CASES.keys())
def test_patched_trainer_trains_as_trl(kind, case, tmp_path):
    found, calls = differences(kind, case, tmp_path)
    assert calls >= STEPS, "TRL never called our op"
    for what, value in found.items():
        bound = case.get("bound", TOLERANCE)
        assert value <= bound, f"{what} differs from TRL's by {value:.2e} relative: {found}"


def test_bf16_is_as_close_to_fp32_as_that_of_trl(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    exact = train("RLOO", tmp_path / "model", tmp_path, {})
    theirs = train("RLOO", tmp_path / "model", tmp_path, dict(bf16=True))
    with fast_trl.patched():
        ours = train("RLOO", tmp_path / "model", tmp_path, dict(bf16=True))
    their_error = max(map(relative, theirs.gradients, exact.gradients))
    assert max(map(relative, ours.gradients, exact.gradients)) <= 1.5 * their_error


@pytest.fixture
def patched():
    with fast_trl.patched():
        yield


def seams() -> list[Any]:
    import trl.experimental.a2po.a2po_trainer as a2po
    import trl.kernels as kernels
    import trl.kernels.chunked_logprob as chunked
    import trl.trainer.utils as utils

    return [
        chunked.ChunkedLogProbFunction,
        kernels.ChunkedLogProbFunction,
        utils._ChunkedLogProbFunction,
        utils.selective_log_softmax,
        utils.entropy_from_logits,
        utils.selective_log_softmax_and_entropy,
        a2po.selective_log_softmax,
    ]


def test_unpatch_restores_the_very_same_objects():
    before = seams()
    fast_trl.patch()
    fast_trl.patch()  # twice is once
    during = seams()
    fast_trl.unpatch()
    assert not any(a is b for a, b in zip(before, during, strict=True))
    assert all(a is b for a, b in zip(before, seams(), strict=True))


def test_a_trainer_imported_after_patch_is_patched_and_restored():
    name = "trl.experimental.a2po.a2po_trainer"
    fast_trl.unpatch()
    original = seams()[3]
    sys.modules.pop(name)
    with fast_trl.patched():
        assert seams()[-1] is fast_trl.selective_log_softmax
    assert sys.modules[name].selective_log_softmax is original


def test_patched_leaves_an_earlier_patch_in_force():
    fast_trl.patch()
    with fast_trl.patched():
        pass
    still = seams()[2]
    fast_trl.unpatch()
    assert still is fast_trl.ChunkedLogProbFunction


def logits_and_ids(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    logits = 3 * torch.randn(3, 5, 37)
    return logits.to(dtype).requires_grad_(), torch.randint(0, 37, (3, 5))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_functions_equal_trl(temperature, mask_dtype):
    import trl.trainer.utils as utils

    logits, ids = logits_and_ids()
    row_mask = (torch.rand(ids.shape) < 0.7).to(mask_dtype)
    weights = torch.randn(2, *ids.shape)

    def score() -> list[torch.Tensor]:
        logps = utils.selective_log_softmax(logits, ids, temperature, row_mask)
        both = utils.selective_log_softmax_and_entropy(
            logits, ids, temperature=temperature, row_mask=row_mask
        )
        frozen = utils.selective_log_softmax_and_entropy(logits, ids, False)[1]
        assert not frozen.requires_grad
        entropy = utils.entropy_from_logits(logits)
        loss = ((logps + both[0]) * weights[0] + (both[1] + entropy) * weights[1]).sum()
        (grad,) = torch.autograd.grad(loss, logits)
        return [logps, *both, frozen, entropy, grad]

    theirs = score()
    with fast_trl.patched():
        ours = score()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_bf16_logits_are_scored_in_fp32(patched):
    import trl.trainer.utils as utils

    logits, ids = logits_and_ids(torch.bfloat16)
    found = utils.selective_log_softmax(logits, ids)
    exact = torch.log_softmax(logits.double(), -1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


def test_several_ids_per_row_stay_with_trl(patched, caplog):
    import trl.trainer.utils as utils

    logits, ids = logits_and_ids()
    several = ids[..., None].expand(3, 5, 4)
    for _ in range(2):
        found = utils.selective_log_softmax(logits, several)
    exact = torch.log_softmax(logits, -1).gather(-1, several)
    torch.testing.assert_close(found, exact)
    assert caplog.text.count("several ids per row") == 1  # one line, whatever the calls


def test_outputs_that_we_do_not_make_stay_with_trl(patched, caplog):
    model = make_model()
    trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.randint(6, 32, (2, 7))
    with torch.no_grad():
        found = model(input_ids=ids, labels=ids, fused_lm_head=True)
        top1 = model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert found.is_top1.equal(top1)
    assert "trl keeps its own ChunkedLogProbFunction: it was asked for is_top1." in caplog.messages


def test_a_head_partitioned_by_zero3_stays_with_trl(patched, monkeypatch):
    from trl.kernels import ChunkedLogProbFunction

    monkeypatch.setattr(ops, "linear_logprob", None)  # a call of it would raise
    hidden, ids = torch.randn(5, 8), torch.randint(0, 11, (5,))
    weight = torch.nn.Parameter(torch.randn(11, 8))
    weight.ds_id = 0  # DeepSpeed's mark
    found = ChunkedLogProbFunction.apply(
        hidden, weight, None, ids, 1.0, 4, None, 1.0, ("log_probs",)
    )
    exact = torch.log_softmax(hidden @ weight.T, -1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(found[0], exact)


def test_a_trl_without_the_seam_is_refused_and_left_alone(monkeypatch):
    import trl.trainer.utils as utils

    monkeypatch.delattr(utils, "entropy_from_logits")
    before = utils.selective_log_softmax
    with pytest.raises(
        ImportError, match=r"utils\.entropy_from_logits is missing.*known to work with trl 1\.16\.0"
    ):
        fast_trl.patch()
    assert utils.selective_log_softmax is before


def test_a_trl_whose_function_takes_other_arguments_is_refused(monkeypatch):
    import trl.trainer.utils as utils

    monkeypatch.setattr(utils, "entropy_from_logits", lambda logits, base: logits)
    with pytest.raises(ImportError, match=r"entropy_from_logits has parameters \['logits', 'base'"):
        fast_trl.patch()


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    gc.freeze()
    print(f"{'case':42} {'loss':>9} {'gradients':>9} {'weights':>9} {'entropy':>9}")
    for name, (kind, case) in CASES.items():
        with tempfile.TemporaryDirectory() as tmp:
            found, _ = differences(kind, case, Path(tmp))
        print(f"{name:42} " + " ".join(f"{v:9.1e}" for v in found.values()), flush=True)
    gc.unfreeze()


if __name__ == "__main__":
    main()
