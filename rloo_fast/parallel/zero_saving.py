"""DeepSpeed's part of a checkpoint, when writing it fails on one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any


@contextmanager
def failing_at_the_end(engine: Any, directory: str) -> Iterator[None]:
    """While open, a file that cannot be written does not end engine.save_checkpoint; at the end, the
    error is raised. The engine's barriers come between the files: others would wait in them.
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
