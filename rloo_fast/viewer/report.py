"""One file that opens from disk: the page, its scripts and styles, and the answers to what it asks.

Curves and checks are whole; of the completions it has the steps that fit, evenly drawn.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from .answers import answer, question
from .pages import ASSETS, MODULES, SCRIPTS, STYLES
from .run import Run

IMPORT = re.compile(r'^import\s+\{[^}]*\}\s+from\s+"\./\w+\.js";\n', re.MULTILINE)
EXPORT = re.compile(r"^export\s+", re.MULTILINE)
MIB = 1 << 20


def report(runs: Sequence[Run], max_mib: float) -> str:
    """HTML. `max_mib`: about what completions and their tokens may take, all runs."""
    answers = dict(_always(runs))
    room = max_mib * MIB / max(len(runs), 1)
    kept = {number: _add_steps(answers, runs, number, room) for number in range(len(runs))}
    answers["report"] = {"steps": kept}
    return _html(as_json(answers))


def as_json(value: Any) -> str:
    """JSON that ends no script and begins no comment, wherever it stands in a page."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _always(runs: Sequence[Run]) -> Iterator[tuple[str, Any]]:
    yield "runs", answer(runs, "runs", {})
    for number in range(len(runs)):
        for path in ("curves", "steps", "health"):
            yield question(path, run=number), answer(runs, path, {"run": str(number)})


def _add_steps(answers: dict[str, Any], runs: Sequence[Run], number: int, room: float) -> list[int]:
    """Steps of a run, the newest, the first, the middle, ... until `room` bytes are full; those
    that are in."""
    steps = [summary["step"] for summary in runs[number].summaries()]
    kept: list[int] = []
    for step in _spread(steps):
        found = dict(_of_step(runs, number, step))
        size = sum(len(as_json(one)) for one in found.values())
        if size > room and kept:
            break
        answers |= found
        room -= size
        kept.append(step)
    return sorted(kept)


def _of_step(runs: Sequence[Run], number: int, step: int) -> Iterator[tuple[str, Any]]:
    place = {"run": number, "step": step}
    found = answer(runs, "completions", {k: str(v) for k, v in place.items()})
    yield question("completions", **place), found
    for row, entry in enumerate(found["rows"]):
        query = {**place, "row": row}
        texts = {k: str(v) for k, v in query.items()}
        yield question("tokens", **query), answer(runs, "tokens", texts)
        if entry["has_messages"]:
            yield question("messages", **query), answer(runs, "messages", texts)


def _spread(steps: Sequence[int]) -> list[int]:
    """The last, the first, then the middles of what lies between."""
    order = [steps[-1], steps[0]] if steps else []
    gaps = [(0, len(steps) - 1)]
    while gaps:
        wider = []
        for low, high in gaps:
            if high - low > 1:
                middle = (low + high) // 2
                order.append(steps[middle])
                wider += [(low, middle), (middle, high)]
        gaps = wider
    return list(dict.fromkeys(order))


def one_script() -> str:
    """The modules of the page as one script; their names at the top level are all different."""
    parts = [EXPORT.sub("", IMPORT.sub("", ASSETS[name].read_text())) for name in MODULES]
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"


def _html(data: str) -> str:
    scripts = [ASSETS[name].read_text() for name in SCRIPTS] + [one_script()]
    styles = [ASSETS[name].read_text() for name in STYLES]
    policy = (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = ASSETS["index.html"].read_text()
    page = re.sub(r"\s*<(?:link|script)\b[^>]*>(?:</script>)?", "", page)
    head = [f'<meta http-equiv="Content-Security-Policy" content="{policy}">']
    head += [f"<style>{style}</style>" for style in styles]
    body = [f'<script type="application/json" id="report">{data}</script>']
    body += [f"<script>{script}</script>" for script in scripts]
    page = page.replace("<head>", "<head>\n" + "\n".join(head), 1)
    return page.replace("</body>", "\n".join(body) + "\n</body>", 1)


def _hashes(texts: Sequence[str]) -> str:
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
