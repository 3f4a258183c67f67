"""Train a GPT: `deepspeed pretrain_gpt.py --config configs/6B.json`; see `--help`."""

import sys

from megagpt.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
