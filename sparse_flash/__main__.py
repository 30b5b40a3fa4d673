"""`python -m sparse_flash`: the command line."""

import sys

from sparse_flash.command import main

if __name__ == "__main__":
    sys.exit(main())
