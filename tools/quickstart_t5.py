"""Run megagpt.commands.quickstart_t5 as `make quickstart-t5` does; see `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megagpt.commands.quickstart_t5 import main

if __name__ == "__main__":
    sys.exit(main())
