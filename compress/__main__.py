"""`python -m compress` is `modelpress`."""

import sys

from compress.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
