"""Python functions and environments in, a set of tools per trajectory out, whose calls end in time.

`RunTools` has those of a run; `RunTools.open(row)` gives the ToolSet of one trajectory.
"""

from .environments import EnvironmentFactory
from .functions import Tool
from .python_tool import python, python_tool
from .run_tools import Opened, RunTools
from .tool_set import ToolResult, ToolSet

__all__ = [
    "EnvironmentFactory",
    "Opened",
    "RunTools",
    "Tool",
    "ToolResult",
    "ToolSet",
    "python",
    "python_tool",
]
