"""`python -m unlost`."""

import sys

from unlost.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
