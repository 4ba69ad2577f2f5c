"""`python -m benchmarks.verifiers`."""

import sys

from .run import main

sys.exit(main())
