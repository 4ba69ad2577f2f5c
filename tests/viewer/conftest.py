"""Runs to look at, and a server of them."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest

from benchmarks.viewer.made_runs import MadeRun
from rloo_fast.viewer.run import open_runs
from rloo_fast.viewer.server import Server

EVIL = (
    "<script>document.title='hacked'</script></script><script>document.title='hacked'</script>",
    "<img src=x onerror=\"document.title='hacked'\">",
    "line\u2028separator\u2029 and <!--<script> & &lt;b&gt; ]]> ",
    "</textarea><svg/onload=document.title='hacked'>",
)


def say(step: int, group: int, sample: int) -> str:
    return EVIL[sample] if group == 0 else f"answer {group * step} of sample {sample}"


def make(folder, steps=6, **more):
    settings = {"max_steps": steps, "num_prompts": 4, "num_generations": 4, "say": say, **more}
    made = MadeRun(folder, **settings)
    for step in range(1, steps + 1):
        made.step(step)
    return made


def opened(*folders, labels=None):
    names = [folder.name for folder in folders]
    return open_runs([*folders], names, labels or names)


@contextmanager
def served(*folders, labels=None):
    server = Server(opened(*folders, labels=labels))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps that has ended."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    make(folder).end()
    return folder
