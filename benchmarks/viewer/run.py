"""Seconds until `rloo-fast view` shows a run, in a headless Chromium.

    python -m benchmarks.viewer --steps 10,100,1000 --json FILE

Runs of 64 prompts x 8 completions of about 60 tokens per step, with 60 metrics, are written once by
the trainer's own writers. Per run and round, with a new server and a new browser profile:

    start        the command begins -> its address is printed
    open         the address is asked for -> every curve in the window is drawn
    completions  the newest step is asked for -> its first completions are there
    a step       another step is asked for -> the same
    health       likewise, with its curves
    frame        the longest wait for a frame while 512 completions are scrolled from end to end,
                 and its median

Gate: the page says the number of steps and completions that were written, and no script fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import harness

from .made_runs import MadeRun

PROMPTS, K, TOKENS = 64, 8, 60
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COMMAND = "from rloo_fast.cli import run_and_exit; run_and_exit()"
SCROLL = """async () => {
  const waits = [], end = document.body.scrollHeight - innerHeight;
  let before = performance.now();
  for (let i = 1; i <= 90; i += 1) {
    scrollTo(0, (end * i) / 90);
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    waits.push(now - before);
    before = now;
  }
  return waits;
}"""
DRAWN = """() => [...document.querySelectorAll(".plot")].every((plot) =>
  plot.getBoundingClientRect().top > innerHeight || plot.firstChild)"""
FIGURES = ("start_s", "open_s", "completions_s", "step_s", "health_s", "frame_ms", "longest_ms")


def write_run(folder: Path, steps: int) -> None:
    made = MadeRun(
        folder, max_steps=steps, num_prompts=PROMPTS, num_generations=K, num_tokens=TOKENS
    )
    for step in range(1, steps + 1):
        made.step(step)
    made.end()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, float]]:
    """(address, seconds until it was printed) of the command in a process of its own."""
    command = [sys.executable, "-c", COMMAND, "view", str(folder), "--port", "0"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield line.split()[0], time.perf_counter() - start
        finally:
            process.terminate()


def look(browser: Any, address: str, steps: int) -> dict[str, float]:
    """One round of figures. AssertionError where the page is wrong."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    found = {"open_s": timed(lambda: (page.goto(address), curves(page)))}
    assert f"step {steps} of {steps}" in page.inner_text("#runs")

    def go(hash: str, ready: Any) -> float:
        page.evaluate("document.querySelector('main').removeAttribute('data-drawn')")
        return timed(lambda: (page.evaluate(f"location.hash = '{hash}'"), ready(page)))

    found["completions_s"] = go("#completions", cards)
    assert f"of {PROMPTS * K} completions" in page.inner_text(".count")
    found["step_s"] = go(f"#completions?step={steps // 2}", cards)
    waits = page.evaluate(SCROLL)
    found |= {"frame_ms": statistics.median(waits), "longest_ms": max(waits)}
    found["health_s"] = go("#health", curves)
    context.close()
    assert not errors, errors
    return found


def curves(page: Any) -> None:
    page.wait_for_selector("main[data-drawn]", timeout=60_000)
    while not page.evaluate(DRAWN):  # wait_for_function would be a script that it may not run
        page.wait_for_timeout(5)


def cards(page: Any) -> None:
    page.wait_for_selector("main[data-drawn] .card", timeout=60_000)


def timed(act: Any) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def measure(folder: Path, steps: int, rounds: int) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    options = ["--no-sandbox"] if os.getuid() == 0 else []
    values: dict[str, list[float]] = {name: [] for name in FIGURES}
    with sync_playwright() as playwright:
        for _ in range(rounds):
            with served(folder) as (address, start_s):
                browser = playwright.chromium.launch(executable_path=found, args=options)
                one = {"start_s": start_s, **look(browser, address, steps)}
                version = browser.version
                browser.close()
            for name in FIGURES:
                values[name].append(one[name])
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "steps": steps, "completions": steps * PROMPTS * K, "mib": size / 2**20, "runs": rounds,
        "browser": version,
        **{name: {"median": statistics.median(v), "max": max(v)} for name, v in values.items()},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    head = "steps   MiB  start   open  completions  a step  health  frame  longest"
    lines = [
        f"{row['steps']:>5} {row['mib']:>5.0f} "
        + " ".join(
            f"{row[name]['median']:>{width}.{digits}f} {unit}"
            for name, width, digits, unit in (
                ("start_s", 4, 1, "s"), ("open_s", 4, 1, "s"), ("completions_s", 10, 1, "s"),
                ("step_s", 5, 1, "s"), ("health_s", 5, 1, "s"), ("frame_ms", 3, 0, "ms"),
                ("longest_ms", 5, 0, "ms"),
            )
        )
        for row in rows
    ]  # fmt: skip
    return "\n".join([head, *lines])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.viewer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--steps", default="10,100,1000", help="of the runs, with commas")
    add("--runs", type=int, default=3, help="timed rounds; medians are shown")
    add("--folder", type=Path, help="where runs are written, and looked for first")
    add("--json", help="write env and rows here")
    args = parser.parse_args(argv)
    env = harness.environment()
    print(json.dumps(env))
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for steps in map(int, args.steps.split(",")):
            folder = (args.folder or Path(temporary)) / f"steps-{steps}"
            if not folder.exists():
                write_run(folder, steps)
            rows.append(measure(folder, steps, args.runs))
    print(table(rows), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"env": env, "rows": rows}, indent=1) + "\n")
    return 0
