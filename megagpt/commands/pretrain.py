"""pretrain_gpt.py: train a GPT model from a config."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megagpt.commands import job, shell
from megagpt.config import Config, data_parallel_size, load_config, to_json
from megagpt.distributed.launcher import Launcher
from megagpt.engine.deepspeed_config import deepspeed_config
from megagpt.errors import ConfigError
from megagpt.output import lossy_output, report_unwritable
from megagpt.planner.coverage import require_supported

EXAMPLE = """examples:
  deepspeed --num_gpus 8 pretrain_gpt.py --config configs/6B.json --set parallel.tensor=8 --set parallel.pipeline=1
  torchrun --nproc_per_node 8 pretrain_gpt.py --config configs/6B.json
  python pretrain_gpt.py --config configs/125M.json --print-config
  python pretrain_gpt.py --config configs/1T.json --dry-run --rank 40 --world-size 2048
docs/config.md describes every key of a config, with its unit and default."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("pretrain_gpt.py", __doc__, EXAMPLE)
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a training run."""
    job.add_arguments(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and DeepSpeed's, then exit")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run the shapes of one step of one rank, without memory and other ranks: print its parameters, FLOPs, saved "
        "activations and collectives, then exit",
    )
    parser.add_argument("--rank", type=int, default=0, help="with --dry-run: the rank, from 0 (%(default)s)")
    parser.add_argument("--world-size", type=int, help="with --dry-run: number of ranks; as few as the layout needs if absent")


@report_unwritable
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = job.parse_arguments(create_parser(), argv)
    return job.run(lambda launcher: pretrain(args, launcher), args.debug)


def pretrain(args: argparse.Namespace, launcher: Launcher) -> int:
    """Train the model of a config, or print the config; return the exit code."""
    if args.print_config:
        return _print_config(args, launcher)
    if args.dry_run:
        if launcher.world_size > 1:
            raise ConfigError(f"--dry-run: is one process, but there are {launcher.world_size}; start it with python")
        return _dry_run(args)
    with lossy_output(), job.open_trainer(args.config, args.set, launcher) as trainer:
        from megagpt.training.banner import announce_run

        announce_run(trainer)
        return trainer.train()


@report_unwritable
def _print_config(args: argparse.Namespace, launcher: Launcher) -> int:
    """Print the config as it would run on the launcher's ranks, or on the smallest number of ranks that its layout needs."""
    config, dp_size = _resolved_config(args, launcher.world_size if launcher.world_size > 1 else None)
    if config.model.vocab_size is not None and (
        config.training.freeze or config.optimizer.learning_rate_scales or config.lora.rank is not None
    ):
        from megagpt.engine.freezing import check_patterns

        check_patterns(config)
    dp_cp_size = dp_size * config.parallel.context
    print(json.dumps({"config": json.loads(to_json(config)), "deepspeed": deepspeed_config(config, dp_cp_size)}, indent=2))
    return 0


@report_unwritable
def _dry_run(args: argparse.Namespace) -> int:
    """Print what one rank does in a step. Raises ConfigError if the rank or the number of ranks does not fit."""
    config, dp_size = _resolved_config(args, args.world_size)
    require_supported(config)
    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline * parallel.context * dp_size
    if not 0 <= args.rank < ranks:
        raise ConfigError(f"--rank {args.rank}: expected 0 to {ranks - 1}, because there are {ranks} ranks")
    if config.model.vocab_size is None:
        raise ConfigError(f"{args.config}: model.vocab_size: set it, because data.tokenizer is not there to take it from")
    from megagpt.parallel.topology import Layout
    from megagpt.planner.rank_report import report_rank

    layout = Layout(parallel.tensor, parallel.pipeline, parallel.context, dp_size)
    compiled = config.zero.stage < 3 if config.training.compile == "auto" else config.training.compile
    print("\n".join(report_rank(config, layout, args.rank, compiled).lines()))
    return 0


def _resolved_config(args: argparse.Namespace, world_size: int | None) -> tuple[Config, int]:
    """Return the config with its vocabulary and schedule, and the data-parallel size.

    `world_size`: number of ranks; the smallest that the layout needs if None.
    """
    config = load_config(args.config, args.set)
    tokenizer = config.data.tokenizer
    if tokenizer == "byte" or (tokenizer and Path(tokenizer).exists()):  # a config can be read without its files
        config = job.with_tokenizer(config, args.config)
    parallel = config.parallel
    smallest = parallel.tensor * parallel.pipeline * parallel.context
    dp_size = data_parallel_size(config, smallest if world_size is None else world_size)
    return job.with_schedule(config, dp_size), dp_size


if __name__ == "__main__":
    sys.exit(main())
