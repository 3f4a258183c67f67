"""What commands that run on many ranks share: a config that all agree on, a trainer, and an end that a launcher sees."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megagpt.commands.shell import INTERRUPTED, USER_ERROR
from megagpt.config import Config, build_config, config_hash, data_parallel_size, load_config, to_json, with_vocab_size
from megagpt.data.blend import build_datasets, check_vocabulary
from megagpt.data.tokenizer import load_tokenizer
from megagpt.errors import ConfigError, MegagptError
from megagpt.planner.schedule import resolve_schedule
from megagpt.training.place import Place, find_place

if TYPE_CHECKING:
    from megagpt.training.trainer import Trainer

CRASHED = 1
AFTER_WATCHDOG = 60.0
"""Seconds by which a collective's own time-out, which names nobody, comes after the watchdog's."""


def run(work: Callable[[Place], int | None], debug: bool) -> int:
    """Do this rank's `work`; returns its exit code. A rank that fails ends at once, so that the launcher ends the job."""
    rank = 0
    try:
        place = find_place(os.environ)
        rank = place.rank
        return work(place) or 0
    except MegagptError as error:
        return _fail(rank, f"error: {error}", debug, USER_ERROR)
    except KeyboardInterrupt:
        return _fail(rank, "interrupted", False, INTERRUPTED)
    except Exception as error:
        return _fail(rank, _unexpected(rank, error), debug, CRASHED)


@contextmanager
def open_trainer(path: str, overrides: Sequence[str], place: Place) -> Iterator["Trainer"]:
    """This rank's trainer of the run that the config describes; closed when the block ends well.

    What can be wrong is found on rank 0 before the other ranks are met, and before torch is imported.
    """
    begun = time.monotonic()
    config = checked(path, overrides, place.world_size) if place.rank == 0 else None
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if _has_cuda() else "cpu")
    from megagpt.parallel.topology import Topology
    from megagpt.parallel.whereabouts import Whereabouts
    from megagpt.resilience.watchdog import Watchdog
    from megagpt.training.processes import start, stop
    from megagpt.training.trainer import Trainer

    device, store = start(place)
    config = _agree(config, device)
    parallel = config.parallel
    datasets = build_datasets(config.data, config.model.n_positions)
    patience = parallel.timeout_seconds + AFTER_WATCHDOG
    topology = Topology.create(parallel.tensor, parallel.pipeline, patience, parallel.context)
    where = Whereabouts(device)
    with Watchdog(store, topology.rank, topology.layout.world_size, where, parallel.timeout_seconds):
        trainer = Trainer(config, topology, datasets, device, where, begun)
        yield trainer
        trainer.close()
    stop()


def checked(path: str, overrides: Sequence[str], world_size: int) -> Config:
    """The config, ready to run on so many ranks. Raises ConfigError and DataError for all that can be known before."""
    config = with_tokenizer(load_config(path, overrides), path)
    if config.model.vocab_size is None:
        raise ConfigError(f"{path}: model.vocab_size: give it, or data.tokenizer to take it from")
    vocab_size = config.model.vocab_size
    config = with_schedule(config, data_parallel_size(config, world_size))
    build_datasets(config.data, config.model.n_positions)
    check_vocabulary(config.data, vocab_size)
    return config


def with_tokenizer(config: Config, path: str) -> Config:
    """The config with what its tokenizer tells. Raises ConfigError where the two contradict each other."""
    if config.data.tokenizer is None:
        return config
    size = load_tokenizer(config.data.tokenizer).vocab_size
    if config.model.vocab_size is None:
        return with_vocab_size(config, size)
    if config.model.vocab_size < size:
        raise ConfigError(
            f"{path}: model.vocab_size: {config.model.vocab_size} is below the {size} tokens of data.tokenizer "
            f"{config.data.tokenizer}; leave it out, or give at least {size}"
        )
    return config


def with_schedule(config: Config, replicas: int) -> Config:
    """The config with a name for "auto", and why on the standard error."""
    micro_batches = config.training.global_batch_size // config.training.micro_batch_size
    config, why = resolve_schedule(config, micro_batches * config.parallel.context // replicas)
    if why:
        print(f"parallel.schedule: {why}", file=sys.stderr, flush=True)
    return config


def _agree(config: Config | None, device: Any) -> Config:
    """Rank 0's config on every rank, checked by hash."""
    import torch.distributed as dist

    sent = [to_json(config) if config else None, config_hash(config) if config else None]
    dist.broadcast_object_list(sent, src=0, device=device)
    text, fingerprint = sent
    assert text is not None
    mine = build_config(json.loads(text), "rank 0's config")
    if config_hash(mine) != fingerprint:
        raise ConfigError("rank 0's config reads otherwise on this rank; install the same version of megagpt on all nodes")
    return mine


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _unexpected(rank: int, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if "Connection closed by peer" in text or "Connection reset by peer" in text:
        return f"rank {rank} stops: another rank has ended ({text[:120]})"
    return f"error: {text}"


def _fail(rank: int, message: str, debug: bool, code: int) -> int:
    """Say it and end: other ranks may wait in a collective that this one will not come to, so nothing is tidied up."""
    if debug:
        traceback.print_exc()
    head = f"[rank {rank}] " if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1 else ""
    print(head + message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        os._exit(code)
    return code
