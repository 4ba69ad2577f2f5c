"""What optimizer and schedule are made of: of a checkpoint, and of the run that resumes it.

transformers restores the states of both, so that some settings of the resumed run come too late.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..config.rloo_config import RLOOConfig
from .files import load_launch

logger = logging.getLogger(__name__)

# these are in the states, so that the checkpoint's count ...
OF_THE_CHECKPOINT = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args",
)  # fmt: skip
# ... and these are not, so that those given now count
OF_THE_SCHEDULE = (
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs",
)  # fmt: skip


def optimizer_settings(args: RLOOConfig) -> dict[str, Any]:
    """Of `args`, as JSON keeps them."""
    values = args.to_dict()
    names = ("optim", *OF_THE_CHECKPOINT, *OF_THE_SCHEDULE)
    return json.loads(json.dumps({name: values[name] for name in names}, default=str))


def compare_with_checkpoint(checkpoint: str, args: RLOOConfig, *, says: bool) -> None:
    """Warn which value counts where a checkpoint's settings are others; `says`: this process does.

    Raises ValueError for an optimizer whose state is of another kind.
    """
    saved = load_launch(Path(checkpoint))["optimizer"]
    now = optimizer_settings(args)
    if _kind(saved["optim"]) != _kind(now["optim"]):
        raise ValueError(
            f"{checkpoint!r} holds the state of optim={saved['optim']!r}, which {now['optim']!r} "
            "cannot go on from: resume with that one, or give the directory as the model, to start "
            "from its weights."
        )
    differing = [name for name in now if name in saved and saved[name] != now[name]]
    for name in differing if says else ():
        if name in OF_THE_CHECKPOINT:
            logger.warning(
                "%s is %s now and was %s in %s: the checkpoint's %s counts, as it comes back with "
                "the optimizer's state. To train with the new one, give the directory as the "
                "model.", name, now[name], saved[name], checkpoint, saved[name],
            )  # fmt: skip
        elif name in OF_THE_SCHEDULE:
            logger.warning(
                "%s is %s now and was %s in %s: %s counts, but the first step still takes the "
                "learning rate that the checkpoint was left with.",
                name, now[name], saved[name], checkpoint, now[name],
            )  # fmt: skip


def _kind(optim: str) -> str:
    """Optimizers of one kind have the same state."""
    return optim.removesuffix("_fused")
