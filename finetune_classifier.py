"""Train a classifier of texts from a pretrained checkpoint: `python finetune_classifier.py --help`."""

import sys

from megagpt.commands.finetune_classifier import main

if __name__ == "__main__":
    sys.exit(main())
