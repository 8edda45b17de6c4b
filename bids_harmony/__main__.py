"""`python -m bids_harmony` is the same as the console script."""

import sys

from bids_harmony.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
