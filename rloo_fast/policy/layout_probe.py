"""Which layout a model can be trained in: by what it declares, and by trying it out.

The trial: log-probs of a short completion behind a prompt that it shares with two more, one of
which begins like it, in the layout, against a padded line of its own. A model that mixes them up,
or their positions, is off by as much as one that reads another completion as part of the prompt.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..batching.layouts import LAYOUTS, best_first
from ..batching.micro_batches import make_micro_batch
from ..models.adapters import base_causal_lm
from ..models.dropout import has_dropout_rates
from ..models.trial import trial_ids
from ..records import GenerationBatch, ImageInputs, Prompt, RolloutRows
from .forward import Policy

# largest mean difference from the padded run, as a share of what mixing up would make
TOLERANCE = 1e-3
TOLERANCE_HALF = 0.25


def choose_layout(
    asked: str,
    policy: Policy,
    wrapped: nn.Module,
    accelerator: Accelerator,
    seen: Prompt | None = None,
) -> tuple[str, str]:
    """(layout, sentence why): the one asked for, or for "auto" the best that the model supports.

    `seen`: a prompt with an image, in a run with images.

    Raises ValueError if the layout asked for is not supported.
    """
    if asked == "padded":
        return asked, 'layout "padded", as asked for'
    reasons: dict[str, str] = {}
    better = [layout.name for layout in best_first() if layout.name != "padded"]
    for layout in better if asked == "auto" else (asked,):
        reason = why_not(layout, policy, wrapped, accelerator, seen)
        if reason is None:
            rest = "; ".join(f'"{name}" cannot be used: {why}' for name, why in reasons.items())
            return layout, f'layout "{layout}"' + (f" ({rest})" if rest else "")
        reasons[layout] = reason
    if asked != "auto":
        raise ValueError(
            f'layout="{asked}" cannot be used with {type(base_causal_lm(policy.model)).__name__}: '
            f'{reasons[asked]}. Set layout="auto" or "padded".'
        )
    if len(set(reasons.values())) == 1:
        (why,) = set(reasons.values())
        return "padded", f'layout "padded": others cannot be used, as {why}'
    rest = "; ".join(f'"{name}" cannot be used: {why}' for name, why in reasons.items())
    return "padded", f'layout "padded" ({rest})'


def why_not(
    layout: str,
    policy: Policy,
    wrapped: nn.Module,
    accelerator: Accelerator,
    seen: Prompt | None = None,
) -> str | None:
    """Why the policy cannot be run in the layout, or None. `seen`: see `choose_layout`."""
    model = base_causal_lm(policy.model)
    reason = LAYOUTS[layout].refusal(model)
    return reason or _trial(layout, policy, wrapped, accelerator, seen)


def runs_images_once(
    layout: str, policy: Policy, wrapped: nn.Module, accelerator: Accelerator, seen: Prompt | None
) -> tuple[bool, str]:
    """(whether images that several lines have are run once for all of them, what to say of it)."""
    if seen is None or LAYOUTS[layout].shares_prompts:
        return False, ""
    reason = _trial(layout, policy, wrapped, accelerator, seen, images_once=True)
    if reason is None:
        return True, "; an image is run once for all completions of its prompt"
    return False, f"; an image is run for every completion, as {reason}"


def _trial(
    layout: str,
    policy: Policy,
    wrapped: nn.Module,
    accelerator: Accelerator,
    seen: Prompt | None,
    *,
    images_once: bool = False,
) -> str | None:
    model = base_causal_lm(policy.model)
    device, ids = accelerator.device, trial_ids(model, 17)[0].tolist()
    prompt = ids[:5] if seen is None else seen.ids
    first, second = ids[5:11], ids[11:]

    def logps(completions: list[list[int]], layout: str, *, once: bool = False) -> Tensor:
        batch = make_micro_batch(
            _one_group(prompt, completions, None if seen is None else seen.inputs),
            [list(range(len(completions)))],
            LAYOUTS[layout],
            device=device,
            pad_token_id=ids[0],
            images_once=once,
        )
        with torch.no_grad(), accelerator.autocast():
            return policy.logps(batch, wrapped).logps[-len(second) :]

    training = policy.model.training
    policy = Policy(  # nothing compiled, not counted
        policy.model,
        temperature=policy.temperature,
        with_head=policy.with_head,
        own_logits=policy.own_logits,
    )
    policy.model.eval()
    try:
        right = logps([second], "padded")
        mixed = logps([first + second], "padded")
        found = logps([first, second[:3] + first[:2], second], layout, once=images_once)
        if has_dropout_rates(model):  # may be in the attention, which no layout but padded has
            policy.model.train()
            # a resumed run tries it later than the run that it continues: no draw may be left
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                logps([first, second], layout)
    except Exception as error:  # a model's code may fail on unknown arguments in any way
        sentence = (str(error).strip().splitlines() or ["no message"])[0][:200]
        return f"a trial run failed ({type(error).__name__}: {sentence})"
    finally:
        policy.model.train(training)
    off, wrong = ((x - right).abs().mean().item() for x in (found, mixed))
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    tolerance = TOLERANCE_HALF if half or accelerator.mixed_precision != "no" else TOLERANCE
    if not off <= tolerance * wrong + 1e-6:
        return f"in a trial run its log-probs were off by {off:.1e}"
    return None


def _one_group(
    prompt: list[int], completions: list[list[int]], inputs: ImageInputs | None
) -> GenerationBatch:
    zeros = torch.zeros(len(completions), dtype=torch.float32)
    return GenerationBatch(
        prompt_ids=[prompt] * len(completions),
        completion_ids=completions,
        num_tokens=[len(ids) for ids in completions],
        groups=[0] * len(completions),
        scores=zeros,
        rows=RolloutRows(
            row=zeros, length=zeros, truncated=zeros, rewards=zeros[:, None], reward=zeros
        ),
        num_generations=len(completions),
        inputs=None if inputs is None else [inputs] * len(completions),
    )
