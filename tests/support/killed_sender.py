"""python -m tests.support.killed_sender URL WAY: a trainer that dies in the middle of a sync."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

from rloo_fast.records import Bucket
from rloo_fast.rollout.vllm.server import VLLMServer

from .serving import tiny


def dying() -> Iterator[Bucket]:
    for number, named in enumerate(tiny(3).state_dict().items()):
        if number == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        yield [named]


if __name__ == "__main__":
    engine = VLLMServer(sys.argv[1], weight_transfer=sys.argv[2])
    engine.wake(("weights",))
    engine.load_weights(1, dying())
