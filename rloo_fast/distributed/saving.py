"""State dicts gathered from sharded weights; DeepSpeed checkpoints that fail to be written."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from .gathering import gathered


def gathered_state(
    accelerator: Accelerator, model: nn.Module, names: Container[str] | None
) -> dict[str, Tensor]:
    """The tensors `names` (None: all) of state_dict() of a model whose weights are sharded.

    On the main process' CPU, gathered one by one; {} on the others.
    """
    kept = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if names is not None and name not in names:
            continue
        (whole,) = gathered([tensor])
        if accelerator.is_main_process:
            kept[name] = whole.cpu()
    return kept


@contextmanager
def failing_at_the_end(engine: Any, directory: str) -> Iterator[None]:
    """While open, a file that cannot be written does not end engine.save_checkpoint, whose barriers
    come between the files: others would wait in them. At the end, the error is raised.
    """
    errors: list[str] = []

    def noted(write: Callable[..., Any]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except Exception as error:
                # not the exception: it would keep the file open that fills the disk
                errors.append(f"{type(error).__name__}: {error}")

        return call

    files = engine.checkpoint_engine
    files.save = noted(files.save)
    engine._copy_recovery_script = noted(engine._copy_recovery_script)
    engine.save_checkpoint = partial(engine.save_checkpoint, save_latest=False)
    try:
        yield
    finally:
        del files.save, engine._copy_recovery_script, engine.save_checkpoint
    if errors:
        raise OSError("; ".join(errors))
    if engine.global_rank == 0:
        (Path(directory) / "latest").write_text(f"global_step{engine.global_steps}")
