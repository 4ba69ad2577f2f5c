"""`python -m benchmarks.overlap`."""

import sys

from .run import main

sys.exit(main())
