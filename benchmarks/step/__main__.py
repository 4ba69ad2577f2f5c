"""`python -m benchmarks.step`."""

import sys

from .run import main

sys.exit(main())
