"""`python -m rloo_fast` and `accelerate launch -m rloo_fast`: the same as `rloo-fast`."""

import sys

from .cli import main

sys.exit(main())
