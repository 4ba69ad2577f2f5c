"""The process of one part: `python -m benchmarks.gpu_smoke.part NAME --json FILE --folder FOLDER`.

A part is a function `run(smoke)`; what it measures it records at once, so that a crash or a limit
of time leaves the figures before it.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from .device import Cuda, Host, Skipped

BEFORE_THE_END_S = 5
MODULES = {  # part -> module, function
    "allocator": ("allocator", "run"),
    "allocator_expandable": ("allocator", "run"),
    "room": ("room", "run"),
    "ddp": ("ddp", "run"),
    "start": ("start", "run"),
    "rollout": ("sampling", "run_rollout"),
    "sampler_check": ("sampling", "run_sampler_check"),
    "training": ("training", "run"),
    "transfer": ("transfer", "run"),
}


@dataclass
class Smoke:
    """What a part works with, and where its result goes."""

    dry: bool  # on the host, with tiny shapes
    engine: str  # "vllm" or "hf", which samples where a part needs an engine
    folder: Path  # for the part's own files
    json: Path
    device: Cuda | Host
    figures: dict[str, float | str | None] = field(default_factory=dict)

    def record(self, **figures: float | str | None) -> None:
        """A part that is stopped later keeps these; None: cannot be measured here."""
        self.figures |= figures
        for name, value in figures.items():
            print(f"{name} = {value}", flush=True)
        self.write("stopped", "the process ended without a word")

    def write(self, status: str, reason: str | None = None) -> None:
        content = {"status": status, "reason": reason, "figures": self.figures}
        beside = self.json.with_suffix(".tmp")
        beside.write_text(json.dumps(content))
        beside.replace(self.json)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_smoke.part")
    parser.add_argument("name", choices=MODULES)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--engine", choices=("vllm", "hf"), default="hf")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--limit-s", type=float, default=600)
    args = parser.parse_args(argv)
    faulthandler.enable()  # a crash, and a part that hangs, print where
    faulthandler.dump_traceback_later(max(args.limit_s - BEFORE_THE_END_S, 1))
    args.folder.mkdir(parents=True, exist_ok=True)
    device = Host() if args.dry else Cuda()
    smoke = Smoke(args.dry, args.engine, args.folder, args.json, device)
    module, function = MODULES[args.name]
    try:
        getattr(importlib.import_module(f".{module}", __package__), function)(smoke)
    except Skipped as reason:
        smoke.write("skipped", str(reason))
    except BaseException as error:  # an exit is a result as well
        traceback.print_exc()
        smoke.write("failed", f"{type(error).__name__}: {error}"[:2000])
        return 1
    else:
        smoke.write("ok")
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 0


if __name__ == "__main__":
    sys.exit(main())
