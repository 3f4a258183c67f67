"""Shared by commands that run on many ranks: one config for all ranks, a trainer, and exit codes that a launcher sees."""

import argparse
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megagpt
from megagpt.commands.shell import INTERRUPTED, USER_ERROR
from megagpt.config import Config, build_config, config_hash, data_parallel_size, load_config, to_json, with_vocab_size
from megagpt.data.blend import build_datasets, check_vocabulary
from megagpt.data.encoder_samples import encoder_format
from megagpt.data.span_corruption import required_vocab_size
from megagpt.data.tokenizer import load_tokenizer
from megagpt.distributed.launcher import Launcher, read_launcher
from megagpt.errors import ConfigError, MegagptError, ReportedError
from megagpt.output import lossy_output, note
from megagpt.planner.auto_schedule import resolve_schedule
from megagpt.planner.hardware import Hardware, gpu_of_device
from megagpt.resilience.interruption import ending_at_once
from megagpt.training.loggers.check import check_loggers

if TYPE_CHECKING:
    from megagpt.training.trainer import Trainer

CRASHED = 1
SILENT_SECONDS = 2.0
"""Time after which a slow part of the start prints a line."""
SECONDS_AFTER_WATCHDOG = 60.0
"""A collective's own timeout names no rank, so it comes this much later than the watchdog's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that runs a config: --config, --set, and the rank that launchers append."""
    parser.add_argument(
        "--config",
        required=True,
        help="JSON file of the run (comments and trailing commas are allowed), or the name of a shipped config, such as 125M",
    )
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of the config, for example parallel.tensor=4 training.tokens=10B",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; only rank 0 prints what is wrong with them, and exits with 2 as all ranks do."""
    try:
        rank = read_launcher(os.environ).rank
    except ConfigError:
        rank = 0
    if rank == 0:
        return parser.parse_args(argv)
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        return parser.parse_args(argv)


def run(work: Callable[[Launcher], int | None], debug: bool) -> int:
    """Run this rank's `work` and return its exit code. A rank that fails exits at once, so that the launcher ends the job."""
    launcher = Launcher()
    try:
        launcher = read_launcher(os.environ)
        return work(launcher) or 0
    except ReportedError as error:
        return _exit(error.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        return _fail(launcher, error, debug)


@contextmanager
def open_trainer(path: str, overrides: Sequence[str], launcher: Launcher) -> Iterator["Trainer"]:
    """Yield this rank's trainer for the run that the config describes; close it if the block succeeds.

    Rank 0 checks everything that it can before the ranks connect, and before torch is imported.
    """
    start_time = time.monotonic()
    ranks = f"{launcher.world_size} rank{'s' if launcher.world_size > 1 else ''}"
    with ending_at_once(launcher.rank):
        with noted_if_slow(launcher, "checking the config and the data"):
            config = checked_config(path, overrides, launcher.world_size) if launcher.rank == 0 else None
        _note(launcher, f"config and data are checked; starting {ranks}")
        import torch

        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        from megagpt.distributed.phase import PhaseTracker
        from megagpt.distributed.process_group import TIMEOUT, destroy_process_group, init_process_group
        from megagpt.distributed.same_everywhere import require_same_code
        from megagpt.engine.deepspeed_internals import init_deepspeed, library_versions
        from megagpt.parallel.topology import Topology
        from megagpt.resilience.watchdog import Watchdog
        from megagpt.training.trainer import Trainer

        cuda = os.environ["DS_ACCELERATOR"] == "cuda"
        device = torch.device("cuda", launcher.local_rank) if cuda else torch.device("cpu")
        store = init_process_group(launcher, device)
    with reported_once(store, launcher), ExitStack() as stack:
        with ending_at_once(launcher.rank):
            init_deepspeed(launcher, "nccl" if cuda else "gloo", TIMEOUT)
            require_same_code(Path(megagpt.__file__).parent, library_versions())
            config = _broadcast_config(config, device)
            parallel = config.parallel
            datasets = build_datasets(config.data, config.model.n_positions, encoder_format(config.model))
            timeout = parallel.timeout_seconds + SECONDS_AFTER_WATCHDOG
            topology = Topology.create(parallel.tensor, parallel.pipeline, timeout, parallel.context)
            phase = PhaseTracker(device)
            world_size = topology.layout.world_size
            _note(launcher, "building the model and the optimizer, and loading a checkpoint if there is one")
            stack.enter_context(Watchdog(store, topology.rank, world_size, phase, parallel.timeout_seconds))
            trainer = Trainer(config, topology, datasets, device, phase, start_time)
        try:
            yield trainer
        except BaseException:
            trainer.logger.close()  # it needs no other rank; without it W&B loses what led to the error
            raise
        trainer.close()
    destroy_process_group()


def _note(launcher: Launcher, text: str) -> None:
    """Print a line about a slow part of the start to standard error, on rank 0."""
    if launcher.rank == 0:
        note(text)


@contextmanager
def noted_if_slow(launcher: Launcher, text: str) -> Iterator[None]:
    """Print a line, on rank 0, if the block is not done after `SILENT_SECONDS`."""
    timer = threading.Timer(SILENT_SECONDS, _note, (launcher, text))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def reported_once(store: Any, launcher: Launcher) -> Iterator[None]:
    """Turn an error that another rank has reported already into a ReportedError. `store`: None on one process."""
    from megagpt.distributed.rendezvous import is_first_report

    try:
        yield
    except ReportedError:
        raise
    except Exception as error:
        text, code = _describe(launcher.rank, error)
        if store is not None and not is_first_report(store, launcher, text):
            raise ReportedError(code) from error
        raise


def checked_config(path: str, overrides: Sequence[str], world_size: int) -> Config:
    """Return the config, ready to run on `world_size` ranks.

    Raises ConfigError and DataError for every problem that can be found before the run.
    """
    config = with_tokenizer(load_config(path, overrides), path)
    if config.model.vocab_size is None:
        raise ConfigError(f"{path}: model.vocab_size: set it, or set data.tokenizer to take it from the tokenizer")
    vocab_size = config.model.vocab_size
    config = with_schedule(config, data_parallel_size(config, world_size))
    build_datasets(config.data, config.model.n_positions, encoder_format(config.model))
    check_vocabulary(config.data, vocab_size)
    check_loggers(config)
    return config


def with_tokenizer(config: Config, path: str) -> Config:
    """Return the config with the vocabulary size of its tokenizer. Raises ConfigError if model.vocab_size is smaller."""
    if config.data.tokenizer is None:
        return config
    size = required_vocab_size(config.data, load_tokenizer(config.data.tokenizer))
    if config.model.vocab_size is None:
        return with_vocab_size(config, size)
    if config.model.vocab_size < size:
        sentinels = " and its sentinels" if config.data.needs_encoder else ""
        raise ConfigError(
            f"{path}: model.vocab_size: {config.model.vocab_size} is below the {size} tokens of data.tokenizer "
            f"{config.data.tokenizer}{sentinels}; leave it out, or set at least {size}"
        )
    return config


def with_schedule(config: Config, dp_size: int) -> Config:
    """Return the config with schedule "auto" resolved for `dp_size` data-parallel ranks; print the reason to stderr."""
    n_micro_batches = config.training.global_batch_size // config.training.micro_batch_size
    start = time.monotonic()

    def report(done: int, total: int) -> None:
        if time.monotonic() - start > SILENT_SECONDS:
            note(f"parallel.schedule: {done} of {total} schedules simulated")

    config, reason = resolve_schedule(config, n_micro_batches // dp_size, report, dp_size, _own_hardware(config))
    if reason:
        note(f"parallel.schedule: {reason}")
    return config


def _own_hardware(config: Config) -> Hardware | None:
    """Return the cluster of this machine's GPU for schedule "auto"; None without a GPU that the planner knows."""
    if config.parallel.schedule != "auto":
        return None  # torch is not needed yet
    import torch

    entry = gpu_of_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if entry is None else Hardware(entry, entry.network)


def _broadcast_config(config: Config | None, device: Any) -> Config:
    """Return rank 0's config on every rank, verified by its hash."""
    import torch.distributed as dist

    sent = [to_json(config) if config else None, config_hash(config) if config else None]
    dist.broadcast_object_list(sent, src=0, device=device)
    text, expected_hash = sent
    assert text is not None
    received = build_config(json.loads(text), "rank 0's config")
    if config_hash(received) != expected_hash:
        raise ConfigError("rank 0's config differs on this rank; install the same version of megagpt on all nodes")
    return received


def _describe(rank: int, error: BaseException) -> tuple[str, int]:
    """Return the message of an error, in one line, and the exit code."""
    if isinstance(error, MegagptError):
        return f"error: {error}", USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if "Connection closed by peer" in text or "Connection reset by peer" in text:
        return f"rank {rank} stops: another rank has ended ({text[:120]})", CRASHED
    return f"error: {text}", CRASHED


def _fail(launcher: Launcher, error: BaseException, debug: bool) -> int:
    """Print the message and exit. If rank 0 fails before the ranks have connected, the others end with the same code."""
    _report(launcher, error, debug)
    code = _describe(launcher.rank, error)[1]
    if launcher.rank == 0 and launcher.world_size > 1 and isinstance(error, Exception) and not _connected():
        from megagpt.distributed.rendezvous import refuse

        with ending_at_once(launcher.rank):
            refuse(launcher, code)
    return _exit(code)


def _report(launcher: Launcher, error: BaseException, debug: bool) -> None:
    """Print the message of an error; with `debug`, and not for Ctrl-C, also the traceback."""
    head = f"[rank {launcher.rank}] " if launcher.world_size > 1 else ""
    with lossy_output():  # the terminal may have ended
        if debug and not isinstance(error, KeyboardInterrupt):
            traceback.print_exception(error)
        print(head + _describe(launcher.rank, error)[0], file=sys.stderr, flush=True)


def _exit(code: int) -> int:
    """Exit without cleanup if there is a process group: other ranks may wait in a collective that this one will never join.

    Otherwise return the code.
    """
    if _connected():
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)
    return code


def _connected() -> bool:
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
