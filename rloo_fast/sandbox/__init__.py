"""A program that a model wrote and its tests in, a Verdict out: `Sandbox().check(program, tests)`.
Or a program alone in, and out what it prints: `Sandbox().run(program)`.

Linux only. docs/sandbox.md says what a program can and cannot reach.
"""

from .client import SandboxError, capabilities
from .pool import Output, Sandbox, Verdict

__all__ = ["Output", "Sandbox", "SandboxError", "Verdict", "capabilities"]
