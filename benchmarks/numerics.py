"""`python -m benchmarks.numerics`: see `benchmarks/tuning/numerics.py`."""

import sys

from benchmarks.tuning.numerics import main

if __name__ == "__main__":
    sys.exit(main())
