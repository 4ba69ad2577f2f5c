"""`python -m rloo_fast` and `accelerate launch -m rloo_fast`: the same as `rloo-fast`."""

import os
import sys
from contextlib import suppress

# `python -m` puts the working directory first, where a stray yaml.py would stand for the package
with suppress(FileNotFoundError):  # the directory was deleted: it shadows nothing
    if sys.path[0] in ("", os.getcwd()):
        del sys.path[0]

from .cli import run_and_exit

run_and_exit()
