"""Names of another package replaced by ours, and put back: what the adapters have in common."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger(__name__)


class Patch:
    """Objects of ours in place of those of the same names in another package.

    package: its import name, which is also its distribution's; known_version: the release that the
    adapter was written against; seams: module -> the replacements of what that module defines,
    each under the `__name__` of the original.
    """

    def __init__(self, package: str, known_version: str, seams: Mapping[str, tuple[Any, ...]]):
        self.package, self.known_version, self.seams = package, known_version, seams
        self._originals: dict[str, Any] = {}
        self._ours = {ours.__name__: ours for found in seams.values() for ours in found}
        self._logged: set[str] = set()
        self._active = False

    def patch(self) -> None:
        """Replace the originals in every loaded module of the package; a second call does nothing.

        Modules imported later take ours from the module that defines the name. What was copied out
        of the package before (a compiled function kept by a trainer) stays, so patch first. It
        reaches this process only.

        Raises ImportError, and replaces nothing, if the package is not installed, or lacks a name
        or has other parameters there than the known version.
        """
        if self._active:
            return
        self._originals = self._find()
        self._swap(self._originals, self._ours)
        self._active = True
        logger.info("%s: log-probs by rloo_fast (%s).", self.package, ", ".join(self._ours))

    def unpatch(self) -> None:
        """Put the very same originals back, also into modules imported since; else do nothing."""
        if self._active:
            self._swap(self._ours, self._originals)
            self._logged.clear()
            self._active = False

    @contextmanager
    def patched(self) -> Iterator[None]:
        """patch() for the length of a `with`; leaves an earlier patch() in force."""
        was_active = self._active
        self.patch()
        try:
            yield
        finally:
            if not was_active:
                self.unpatch()

    def original(self, name: str, reason: str) -> Any:
        """The package's own `name`, for a call that ours do not make; each reason logs one line."""
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("%s keeps its own %s: %s.", self.package, name, reason)
        return self._originals[name]

    def _find(self) -> dict[str, Any]:
        found, wrong = {}, []
        for module_name, replacements in self.seams.items():
            try:
                module = import_module(module_name)
            except ModuleNotFoundError as error:
                if error.name == self.package:
                    raise ImportError(
                        f"{self.package} is not installed: {self._install()}."
                    ) from error
                if not module_name.startswith(error.name or "?"):
                    raise  # something that the package itself needs
                module = None
            for ours in replacements:
                theirs = getattr(module, ours.__name__, None)
                if theirs is None:
                    wrong.append(f"{module_name}.{ours.__name__} is missing")
                elif _parameters(theirs) != _parameters(ours)[: len(_parameters(theirs))]:
                    wrong.append(
                        f"{module_name}.{ours.__name__} has parameters {_parameters(theirs)} "
                        f"where {_parameters(ours)} were expected"
                    )
                found[ours.__name__] = theirs
        if wrong:
            raise ImportError(
                f"{self.package} {self._installed()} does not fit this adapter: "
                f"{'; '.join(wrong)}. It is known to work with {self.package} "
                f"{self.known_version}: {self._install()}."
            )
        return found

    def _installed(self) -> str:
        try:
            return version(self.package)
        except PackageNotFoundError:  # imported from a source tree
            return "(version unknown)"

    def _install(self) -> str:
        return f"pip install {self.package}=={self.known_version}"

    def _swap(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        swaps = {id(old[name]): new[name] for name in old}
        for module_name, module in list(sys.modules.items()):
            inside = module_name == self.package or module_name.startswith(self.package + ".")
            if inside and isinstance(module, ModuleType):
                for key, value in list(vars(module).items()):
                    if id(value) in swaps:
                        setattr(module, key, swaps[id(value)])


def _parameters(function: Any) -> list[str]:
    """Names of the parameters; of an autograd.Function or its `apply` those that apply takes."""
    owner = getattr(function, "__self__", function)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return list(inspect.signature(owner.forward).parameters)[1:]  # after ctx
    return list(inspect.signature(getattr(function, "apply", function)).parameters)
