"""pretrain_gpt.py: train a GPT as a config says."""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from megagpt.commands.shell import INTERRUPTED, USER_ERROR
from megagpt.config import Config, build_config, config_hash, data_parallel_size, load_config, to_json, with_vocab_size
from megagpt.data.blend import build_datasets, check_vocabulary
from megagpt.data.tokenizer import load_tokenizer
from megagpt.errors import ConfigError, MegagptError
from megagpt.planner.schedule import resolve_schedule
from megagpt.training.deepspeed_config import deepspeed_config
from megagpt.training.place import Place, find_place

EXAMPLE = """examples:
  deepspeed --num_gpus 8 pretrain_gpt.py --config configs/6B.json --set parallel.tensor=8 --set parallel.pipeline=1
  torchrun --nproc_per_node 8 pretrain_gpt.py --config configs/6B.json
  python pretrain_gpt.py --config configs/125M.json --print-config
Every key of a config, with its unit and default, is in docs/config.md."""
CRASHED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. A rank that fails ends its process at once, so that the launcher ends the job."""
    args = _parser().parse_args(argv)
    rank = 0
    try:
        place = find_place(os.environ)
        rank = place.rank
        if args.print_config:
            _print_config(_resolved(args), place)
            return 0
        _train(args, place)
    except MegagptError as error:
        return _fail(rank, f"error: {error}", args.debug, USER_ERROR)
    except KeyboardInterrupt:
        return _fail(rank, "interrupted", False, INTERRUPTED)
    except Exception as error:
        return _fail(rank, _unexpected(rank, error), args.debug, CRASHED)
    return 0


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


def _resolved(args: argparse.Namespace) -> Config:
    """The config with what its tokenizer tells. Raises ConfigError where the two contradict each other."""
    config = load_config(args.config, args.set)
    if config.data.tokenizer is None:
        return config
    if args.print_config and config.data.tokenizer != "byte" and not os.path.exists(config.data.tokenizer):  # noqa: PTH110
        return config  # a config can be looked at where its files are not
    size = load_tokenizer(config.data.tokenizer).vocab_size
    if config.model.vocab_size is None:
        return with_vocab_size(config, size)
    if config.model.vocab_size < size:
        raise ConfigError(
            f"{args.config}: model.vocab_size: {config.model.vocab_size} is below the {size} tokens of data.tokenizer "
            f"{config.data.tokenizer}; leave it out, or give at least {size}"
        )
    return config


def _train(args: argparse.Namespace, place: Place) -> None:
    # What can be wrong is found on rank 0 before the other ranks are met, and before torch is imported.
    config = _checked(args, place.world_size) if place.rank == 0 else None
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if _has_cuda() else "cpu")
    from megagpt.parallel.topology import Topology
    from megagpt.training.processes import start, stop
    from megagpt.training.trainer import Trainer

    device = start(place)
    config = _agree(config, device)
    datasets = build_datasets(config.data, config.model.n_positions)
    parallel = config.parallel
    topology = Topology.create(parallel.tensor, parallel.pipeline, parallel.timeout_seconds, parallel.context)
    trainer = Trainer(config, topology, datasets, device)
    trainer.train()
    trainer.close()
    stop()


def _checked(args: argparse.Namespace, world_size: int) -> Config:
    config = _resolved(args)
    if config.model.vocab_size is None:
        raise ConfigError(f"{args.config}: model.vocab_size: give it, or data.tokenizer to take it from")
    config = _with_schedule(config, data_parallel_size(config, world_size))
    build_datasets(config.data, config.model.n_positions)
    assert config.model.vocab_size is not None
    check_vocabulary(config.data, config.model.vocab_size)
    return config


def _with_schedule(config: Config, replicas: int) -> Config:
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


def _print_config(config: Config, place: Place) -> None:
    ranks = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    data = data_parallel_size(config, place.world_size if place.world_size > 1 else ranks)
    config = _with_schedule(config, data)
    print(json.dumps({"config": json.loads(to_json(config)), "deepspeed": deepspeed_config(config, data)}, indent=2))


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
