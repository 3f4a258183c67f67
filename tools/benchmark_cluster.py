"""Run megagpt.commands.benchmark_cluster from a clone of the repository; see `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megagpt.commands.benchmark_cluster import main

if __name__ == "__main__":
    sys.exit(main())
