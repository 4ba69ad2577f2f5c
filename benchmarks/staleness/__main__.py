"""`python -m benchmarks.staleness`."""

import sys

from .run import main

sys.exit(main())
