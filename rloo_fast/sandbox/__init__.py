"""A program that a model wrote and its tests in, a Verdict out: `Sandbox().check(program, tests)`.

Linux only. docs/sandbox.md says what a program can and cannot reach.
"""

from .client import SandboxError, capabilities
from .pool import Sandbox, Verdict

__all__ = ["Sandbox", "SandboxError", "Verdict", "capabilities"]
