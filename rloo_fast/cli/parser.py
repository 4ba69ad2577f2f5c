"""The commands that argparse reads: options with `_` or `-`, and one line of error, as `train`."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from .options import UsageError


class Parser(argparse.ArgumentParser):
    """Options may be written with `_` or `-`; a mistake is a UsageError that names the nearest."""

    def __init__(self, prog: str, description: str | None, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's. Raises UsageError."""
        spelled = {name.replace("-", "_"): name for name in self._option_string_actions}
        words = []
        for word in args or ():
            name, equals, value = word.partition("=")
            known = spelled.get(name.replace("-", "_"))
            if word.startswith("--") and len(word) > 2:
                if known is None:
                    self._unknown(name, spelled)
                word = f"{known}{equals}{value}"
            words.append(word)
        return super().parse_args(words, namespace)

    def _unknown(self, name: str, spelled: dict[str, str]) -> NoReturn:
        close = difflib.get_close_matches(name.replace("-", "_"), spelled, n=1)
        hint = f". `{self.prog} --help` lists every one."
        if close:
            hint = f": did you mean {spelled[close[0]]}?"
        raise UsageError(f"unknown option {name}{hint}")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See `{self.prog} --help`.")
