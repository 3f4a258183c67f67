"""Train an encoder and a decoder: `deepspeed pretrain_t5.py --config configs/t5-v1.1-base.json`; see `--help`."""

import sys

from megagpt.commands.pretrain_t5 import main

if __name__ == "__main__":
    sys.exit(main())
