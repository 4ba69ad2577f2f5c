"""The assets of the page: what is served, and what a report is made of."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "assets"
CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}
# a module after those that it imports
MODULES = (
    "dom.js", "data.js", "state.js", "format.js", "charts.js", "overview.js", "tokens.js",
    "completion.js", "completions.js", "health.js", "timing.js", "app.js",
)  # fmt: skip
SCRIPTS = ("uplot/uPlot.iife.min.js",)
STYLES = ("uplot/uPlot.min.css", "style.css")
NAMES = ("index.html", "icon.svg", *MODULES, *SCRIPTS, *STYLES)
ASSETS = {name: FOLDER / name for name in NAMES}
