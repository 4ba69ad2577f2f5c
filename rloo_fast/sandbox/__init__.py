"""Running what a model wrote: `Sandbox().check(program, tests)` -> Verdict.

docs/sandbox.md says what is kept from what. Linux only.
"""

from rloo_fast.sandbox.client import SandboxError, capabilities
from rloo_fast.sandbox.pool import Sandbox, Verdict

__all__ = ["Sandbox", "SandboxError", "Verdict", "capabilities"]
