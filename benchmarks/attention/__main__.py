"""`python -m benchmarks.attention`."""

import sys

from .run import main

sys.exit(main())
