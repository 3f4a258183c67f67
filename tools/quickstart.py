"""Train a small GPT on this machine's CPU, from text to samples; see `--help`."""

import sys

from megagpt.commands.quickstart import main

if __name__ == "__main__":
    sys.exit(main())
