"""pretrain_t5.py: train a model with an encoder and a decoder, such as T5, from a config."""

import argparse
import sys
from collections.abc import Sequence

from megagpt.commands import job, pretrain, shell
from megagpt.config import load_config
from megagpt.distributed.launcher import Launcher
from megagpt.errors import ConfigError
from megagpt.output import report_unwritable

EXAMPLE = """examples:
  deepspeed --num_gpus 8 pretrain_t5.py --config configs/t5-v1.1-base.json --set data.tokenizer=data/tokenizer.model
  python pretrain_t5.py --config configs/t5-v1.1-base.json --set parallel.tensor=2 parallel.pipeline=2 --print-config
docs/encoder-decoder.md describes the model and its data, docs/config.md every key of a config."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("pretrain_t5.py", __doc__, EXAMPLE)
    pretrain.add_arguments(parser)
    return parser


@report_unwritable
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = job.parse_arguments(create_parser(), argv)
    return job.run(lambda launcher: _pretrain(args, launcher), args.debug)


def _pretrain(args: argparse.Namespace, launcher: Launcher) -> int:
    if launcher.rank == 0 and not load_config(args.config, args.set).model.encoder_layers:
        raise ConfigError(f"{args.config}: model.encoder_layers: 0, but pretrain_t5.py trains an encoder; use pretrain_gpt.py")
    return pretrain.pretrain(args, launcher)


if __name__ == "__main__":
    sys.exit(main())
