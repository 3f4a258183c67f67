"""pretrain_gpt.py: train a GPT as a config says."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megagpt.commands import job
from megagpt.config import data_parallel_size, load_config, to_json
from megagpt.training.deepspeed_config import deepspeed_config
from megagpt.training.place import Place

EXAMPLE = """examples:
  deepspeed --num_gpus 8 pretrain_gpt.py --config configs/6B.json --set parallel.tensor=8 --set parallel.pipeline=1
  torchrun --nproc_per_node 8 pretrain_gpt.py --config configs/6B.json
  python pretrain_gpt.py --config configs/125M.json --print-config
Every key of a config, with its unit and default, is in docs/config.md."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(argv)
    return job.run(lambda place: _pretrain(args, place), args.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pretrain_gpt.py", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a JSON file; comments and trailing commas allowed")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, such as parallel.tensor=4"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and DeepSpeed's, and end")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser


def _pretrain(args: argparse.Namespace, place: Place) -> int:
    if args.print_config:
        _print_config(args, place)
        return 0
    with job.open_trainer(args.config, args.set, place) as trainer:
        return trainer.train()


def _print_config(args: argparse.Namespace, place: Place) -> None:
    """The tree as it would run, on so many ranks as there are, or as its layout needs."""
    config = load_config(args.config, args.set)
    tokenizer = config.data.tokenizer
    if tokenizer == "byte" or (tokenizer and Path(tokenizer).exists()):  # a config can be looked at where its files are not
        config = job.with_tokenizer(config, args.config)
    ranks = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    data = data_parallel_size(config, place.world_size if place.world_size > 1 else ranks)
    config = job.with_schedule(config, data)
    print(json.dumps({"config": json.loads(to_json(config)), "deepspeed": deepspeed_config(config, data)}, indent=2))
