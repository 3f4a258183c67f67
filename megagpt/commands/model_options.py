"""Shared by commands that use a trained model: its options, loading it on one or more ranks, and errors."""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megagpt.commands import job, shell
from megagpt.commands.progress import progress
from megagpt.distributed.launcher import Launcher, read_launcher
from megagpt.errors import ConfigError, MegagptError, ReportedError
from megagpt.inference.device import select_device
from megagpt.inference.source import TrainedModel, open_source
from megagpt.model.gpt import DTYPES
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.topology import Topology
from megagpt.progress import NoProgress


class Ranks(NamedTuple):
    """This process among those that share a model."""

    launcher: Launcher
    device: torch.device
    topology: Topology

    @property
    def parallel(self) -> ParallelContext:
        """What the layers need to know."""
        return ParallelContext.of(self.topology, sequence_parallel=False, deferred_gradients=DeferredGradients())

    @property
    def is_first(self) -> bool:
        """Whether this process reads input and prints."""
        return self.launcher.rank == 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model to load, and how."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="folder of a checkpoint, of a run (its newest checkpoint is used), or of a Hugging Face model",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="tokenizer to use instead of the checkpoint's: like data.tokenizer in a config"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N, or auto: a GPU if there is one (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="dtype of weights and activations (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-checksums", action="store_true", help="do not compare the checkpoint's files with their SHA-256"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it


def run(
    main: Callable[[argparse.Namespace, Launcher], None], parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> int:
    """Parse the arguments, call `main` on this rank, and return the exit code. Only rank 0 prints to standard output."""
    if _is_alone():
        return shell.run(lambda args: main(args, Launcher()), parser, argv)
    args = job.parse_arguments(parser, argv)

    def on_rank(launcher: Launcher) -> None:
        if launcher.rank == 0:
            main(args, launcher)
            return
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            try:
                main(args, launcher)
            except MegagptError:
                if torch.distributed.is_initialized():
                    raise  # reported once, see `connected`
                raise ReportedError(shell.USER_ERROR) from None  # every rank finds a wrong option; the first one reports it

    return job.run(on_rank, args.debug)


def _is_alone() -> bool:
    try:
        return read_launcher(os.environ).world_size == 1
    except ConfigError:
        return False  # `job.run` reports it


@contextmanager
def connected(args: argparse.Namespace, launcher: Launcher, tensor: int | None = None) -> Iterator[Ranks]:
    """Connect the ranks; yield this rank's place. `tensor`: ranks that share one copy of the model, all if absent.

    Raises ConfigError if the ranks cannot be divided so.
    """
    if launcher.world_size == 1:
        if tensor not in (None, 1):
            raise ConfigError(f"--tensor {tensor}: there is 1 process; start {tensor} with torchrun --nproc-per-node {tensor}")
        yield Ranks(launcher, select_device(args.device), Topology())
        return
    tensor = tensor or launcher.world_size
    if launcher.world_size % tensor:
        raise ConfigError(f"--tensor {tensor}: does not divide the {launcher.world_size} ranks")
    from megagpt.distributed.process_group import destroy_process_group, init_process_group

    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu") if on_cpu else select_device(f"cuda:{launcher.local_rank}")
    store = init_process_group(launcher, device)
    with job.reported_once(store, launcher):
        yield Ranks(launcher, device, Topology.create(tensor, 1))
    destroy_process_group()


def load(args: argparse.Namespace, ranks: Ranks) -> TrainedModel:
    """Load this rank's part of the model that the options name. Raises MegagptError."""
    source = open_source(args.checkpoint, args.tokenizer)
    checksums = not args.skip_checksums
    if not ranks.is_first:
        return source.load(ranks.device, args.dtype, checksums, NoProgress(), ranks.parallel)
    total: Any = source.total_bytes(checksums)
    with progress("verify", total) as bar:
        return source.load(ranks.device, args.dtype, checksums, bar, ranks.parallel)
