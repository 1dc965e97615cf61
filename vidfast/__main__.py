"""`python -m vidfast` is `vidfast`."""

import sys

from vidfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
