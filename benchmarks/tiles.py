"""`python -m benchmarks.tiles`: see `benchmarks/tuning/tiles.py`."""

import sys

from benchmarks.tuning.tiles import main

if __name__ == "__main__":
    sys.exit(main())
