"""`python -m benchmarks.fp8`: see `benchmarks/tuning/fp8.py`."""

import sys

from benchmarks.tuning.fp8 import main

if __name__ == "__main__":
    sys.exit(main())
