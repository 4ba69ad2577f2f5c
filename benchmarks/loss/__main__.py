"""`python -m benchmarks.loss`."""

import sys

from .run import main

sys.exit(main())
