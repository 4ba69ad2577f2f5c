"""`python -m benchmarks.dynamic_sampling`."""

import sys

from .run import main

sys.exit(main())
