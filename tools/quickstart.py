"""Run megagpt.commands.quickstart, as `make quickstart` does; see `--help`."""

import sys

from megagpt.commands.quickstart import main

if __name__ == "__main__":
    sys.exit(main())
