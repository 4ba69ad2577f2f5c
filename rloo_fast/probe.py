"""Which layout a model can be trained in: by what it declares, and by trying it out.

The trial: log-probs of a short completion behind a prompt that it shares with another one, in the
layout, against a padded line of its own. A model that mixes up the two, or their positions, is off
by as much as one that reads the other completion as part of the prompt.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .attention import unsupported_reason
from .layouts import make_batch
from .models import base_causal_lm, has_attention_dropout
from .policy import Policy
from .types import Samples

ORDER = ("shared_prefix", "packed", "padded")  # best first
# largest mean difference from the padded run, as a share of what mixing up would make
TOLERANCE = 1e-3
TOLERANCE_HALF = 0.25


def choose_layout(
    asked: str, policy: Policy, wrapped: nn.Module, accelerator: Accelerator
) -> tuple[str, str]:
    """(layout, sentence why): the one asked for, or for "auto" the best that the model supports.

    Raises ValueError if the layout asked for is not supported.
    """
    if asked == "padded":
        return asked, 'layout "padded", as asked for'
    reasons: dict[str, str] = {}
    for layout in ORDER[:-1] if asked == "auto" else (asked,):
        reason = why_not(layout, policy, wrapped, accelerator)
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
    layout: str, policy: Policy, wrapped: nn.Module, accelerator: Accelerator
) -> str | None:
    """Why the policy cannot be run in the layout, or None."""
    model = base_causal_lm(policy.model)
    reason = unsupported_reason(model, layout=layout)
    if reason is None and has_attention_dropout(model):
        reason = "the model has attention dropout"
    return reason or _trial(layout, policy, wrapped, accelerator)


def _trial(layout: str, policy: Policy, wrapped: nn.Module, accelerator: Accelerator) -> str | None:
    model = base_causal_lm(policy.model)
    device, vocab = accelerator.device, model.config.get_text_config().vocab_size
    ids = torch.randint(vocab, (17,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt, first, second = ids[:5], ids[5:11], ids[11:]

    def logps(prompt: list[int], completions: list[list[int]], layout: str) -> Tensor:
        samples = _samples(prompt, completions)
        units = [list(range(len(completions)))]
        batch = make_batch(samples, units, layout, device=device, pad_token_id=ids[0])
        with torch.no_grad(), accelerator.autocast():
            return policy.score(batch, wrapped).logps[-len(second) :]

    training = policy.model.training
    policy = Policy(  # nothing compiled, not counted
        policy.model, temperature=policy.temperature, with_head=policy.with_head
    )
    policy.model.eval()
    try:
        right = logps(prompt, [second], "padded")
        mixed = logps(prompt + first, [second], "padded")
        found = logps(prompt, [first, second], layout)
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


def _samples(prompt: list[int], completions: list[list[int]]) -> Samples:
    bounds = [0]
    for ids in completions:
        bounds.append(bounds[-1] + len(ids))
    return Samples(
        prompt_ids=[prompt] * len(completions),
        completion_ids=completions,
        cu_seqlens=torch.tensor(bounds),
        scores=torch.zeros(len(completions)),
        num_generations=len(completions),
        groups=[0] * len(completions),
        whole_groups=True,
    )
