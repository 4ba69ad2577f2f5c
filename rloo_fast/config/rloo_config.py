"""RLOOConfig: its fields, read once and checked once, before a model is loaded.

Names of TRL's 2024 trainer: see `names_2024.py`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from ..masking import MASK, find_mask, learn, masked_errors, masked_values, shown
from .asynchronous import refuse_asynchronous
from .changes import changed_since, prefer_the_changed, values_of
from .checks import batch_sizes, check_ranges, clean
from .engines import prepare_engine
from .fields import RLOOFields
from .prompt_checks import refuse_which_prompts
from .ranges import BEFORE, check_values
from .refused import refuse
from .renames import apply_names_2024
from .rollout_engine import settled

HUB_TOKENS = ("hub_token", "push_to_hub_token")


@dataclass
class RLOOConfig(RLOOFields):
    """Everything a run can be told. Defaults are TRL 1.16's except: dropout is off, and bf16 is
    chosen only where a GPU supports it. Raises ValueError with what to write for bad values.

    A batch is counted in completions: one optimizer step uses per_device_train_batch_size x
    gradient_accumulation_steps x number of processes of them; num_generations belong to one prompt.
    """

    def __post_init__(self) -> None:
        with masked_errors():
            self._read_and_check()

    def _read_and_check(self) -> None:
        for name in HUB_TOKENS:
            if getattr(self, name, None) == f"<{name.upper()}>":  # as to_dict() hides it
                setattr(self, name, None)
        self._learn()
        self._refuse_masks()
        check_values(self, BEFORE)
        apply_names_2024(self)
        if self.bf16 is None:
            self.bf16 = (
                not self.fp16
                and torch.cuda.is_available()
                and torch.cuda.is_bf16_supported(including_emulation=False)
            )
        if hasattr(self, "activation_checkpointing") and self.activation_checkpointing is None:
            # transformers >= 5.20 calls it so and warns about the old name
            self.activation_checkpointing = self.gradient_checkpointing
            if self.activation_checkpointing_kwargs is None:
                self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        super().__post_init__()
        self._learn()  # JSON is read by now
        prepare_engine(self)
        self.use_vllm, self.vllm_mode = settled(self.rollout_engine, self.use_vllm, self.vllm_mode)
        clean(self)
        check_ranges(self)
        refuse(self)
        batch_sizes(self)
        refuse_asynchronous(self)
        refuse_which_prompts(self)
        self._when_made: dict[str, Any] = values_of(self)

    def settle(self) -> None:
        """Work out again what follows from fields that were set since, and check everything again.

        Of two fields that say the same, the one that was set last counts. Raises as the constructor
        does.
        """
        self._refuse_masks()  # of one that was saved, and loaded without the constructor
        if changed := changed_since(self, self._when_made):
            prefer_the_changed(self, changed)
            RLOOConfig.__post_init__(self)  # a subclass' own has seen these values already

    def _learn(self) -> None:
        for name in (f.name for f in fields(self) if f.init):
            learn(getattr(self, name), name)

    def _refuse_masks(self) -> None:
        for name in (f.name for f in fields(self) if f.init):
            if place := find_mask(getattr(self, name), name):
                raise ValueError(
                    f"{place} is {MASK!r}: a secret that was left out when this configuration was "
                    "saved or shown. Give it again, or let what needs it read the environment."
                )

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, as in training_args.bin: tokens of the Hub are None, other secrets MASK,
        which no trainer takes."""
        values = super().__getstate__() | {"_when_made": dict(self._when_made)}
        for kept in (values, values["_when_made"]):
            kept.update({name: None for name in HUB_TOKENS if name in kept})
        return masked_values(values)

    # a copy in this process keeps its secrets; by default, pickle's rules would hold for it
    def __copy__(self) -> Self:
        new = object.__new__(type(self))
        vars(new).update(super().__getstate__())
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = memo[id(self)] = object.__new__(type(self))
        vars(new).update(copy.deepcopy(super().__getstate__(), memo))
        return new

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):  # or @dataclass would make one that shows every value
            cls.__repr__ = RLOOConfig.__repr__

    def __str__(self) -> str:
        lines = "".join(f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{lines})"

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Every field, such that RLOOConfig(**config.to_dict()) is the same, without secrets.

        Trackers and logs get this. A secret other than a token of the Hub has to be given again.
        """
        return {
            **masked_values(super().to_dict()),
            "stop_token": self.stop_token,  # no secret, though it is called a token
            "gradient_accumulation_steps": self.micro_steps_per_update,
        }


def as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """A field that takes a mapping, or JSON on a command line, as a new dict; None is empty."""
    if isinstance(value, str):
        raise ValueError(f"expected a mapping or a JSON object {{...}}, got {shown(value)}.")
    return dict(value or {})


def trainer_args(args: object, model: Any) -> RLOOConfig:
    """The configuration a Trainer runs with: the user's, with what was set since it was made.

    With None, defaults with an output_dir named after the model. Raises TypeError for anything but
    an RLOOConfig, ValueError for values that do not fit.
    """
    if args is None:
        config = getattr(model, "config", None)
        name = model if isinstance(model, str) else getattr(config, "_name_or_path", "")
        args = RLOOConfig(f"{(name or 'model').rstrip('/').split('/')[-1]}-RLOO")
    if not isinstance(args, RLOOConfig):
        raise TypeError(
            f"args must be a rloo_fast.RLOOConfig, got {type(args).__module__}."
            f"{type(args).__name__}: change the import."
        )
    args.settle()
    return args
