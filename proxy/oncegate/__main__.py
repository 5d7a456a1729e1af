"""`python -m oncegate` is `oncegate`."""

import sys

from oncegate.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
