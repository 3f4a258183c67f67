"""How long a save holds up training and how long it takes to be on disk: megagpt's, torch.save, torch.distributed.checkpoint.

    python benchmarks/checkpoint.py --parameters-config configs/350M.json

The state is that of one process which trains the config's model with Adam: fp32 weights and two moments, random values.
Each way of saving writes it twice, since a first save makes buffers that a second one finds; those that write in the
background once more beside matrix products, whose speed says what is left of the machine for training. Each has a process
of its own, so that no buffer or page of one is in the way of the next, and begins with a disk that has nothing to write.
What is written is deleted after each save.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.save import Entry, Saved, Saver
from megagpt.config import load_config
from megagpt.model.gpt import GPTChunk
from megagpt.parallel.shard import TensorParallel, shard_of
from megagpt.parallel.weight_gradients import WeightGradients

KINDS = ("master", "exp_avg", "exp_avg_sq")
SPARE = 2 * 10**9
"""Bytes of memory beside the state and a copy of it: torch, and pages that wait for the disk."""
ALONE = 5.0
"""Seconds that the matrix products are timed with no save beside them."""
State = dict[str, dict[str, torch.Tensor]]


class Save(NamedTuple):
    """One save, as it was timed."""

    label: str
    stall: float
    """Seconds that training would have waited."""
    total: float
    """Seconds until the call that waits for its end has returned."""
    n_bytes: int
    """Of the files."""
    speed_beside: float | None = None
    """Of matrix products during the write in the background, as a share of their speed alone."""


def main() -> None:
    """Print a table of all ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters-config", default="configs/350M.json", help="a config; the shapes are its model's")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the disk to write to (default /var/tmp)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for copies and matrix products (default 1)")
    args = parser.parse_args()
    shapes = parameter_shapes(args.parameters_config)
    n_parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    n_bytes = n_parameters * len(KINDS) * torch.float32.itemsize
    problem = too_little(args.folder, n_bytes)
    if problem:
        sys.exit(f"error: {problem}")
    print(f"{n_parameters / 1e6:.1f}M parameters, {n_bytes / 1e9:.2f} GB of state, {args.threads} thread(s)", flush=True)
    saves: list[Save] = []
    for way in (megagpt, torch_save, torch_save_fsync, dcp_save, dcp_async_save):
        with (
            tempfile.TemporaryDirectory(dir=args.folder) as folder,
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
        ):
            try:
                found = process.submit(timed, way, shapes, Path(folder), args.threads).result()
            except Exception as error:  # the others are of use without it
                print(f"{way.__name__}: failed: {type(error).__name__}: {error}", flush=True)
                continue
        for save in found:
            print(f"{save.label}: stall {save.stall:.3f} s, total {save.total:.1f} s", flush=True)
        saves += found
    print(table(saves))


def parameter_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Logical shapes of the whole model's parameters, by name; no weight is made."""
    config = load_config(path)
    with torch.device("meta"):
        model = GPTChunk(config, TensorParallel(WeightGradients()), range(config.model.n_layer))
    return {shard_of(parameter).name: shard_of(parameter).shape for parameter in model.parameters()}


def too_little(folder: Path, n_bytes: int) -> str | None:
    """Why the folder or the machine will not do; None where they will."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    _, kind = max((mount for mount in mounts if folder.resolve().is_relative_to(mount[0])), key=lambda mount: len(mount[0]))
    if kind in ("tmpfs", "ramfs"):
        return f"{folder} is in memory ({kind}); name a --folder on a disk"
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    memory, disk = int(lines["MemAvailable"].split()[0]) * 1024, shutil.disk_usage(folder).free
    if memory < 2 * n_bytes + SPARE:  # the copy that a save in the background writes from
        return f"{memory / 1e9:.1f} GB of memory are available, {(2 * n_bytes + SPARE) / 1e9:.1f} GB are needed"
    if disk < 1.1 * n_bytes:
        return f"{disk / 1e9:.1f} GB are free in {folder}, {1.1 * n_bytes / 1e9:.1f} GB are needed"
    return None


def timed(
    way: Callable[[State, Path], list[Save]], shapes: dict[str, tuple[int, ...]], folder: Path, threads: int
) -> list[Save]:
    """Make the state and save it, in a process of its own."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = {kind: {name: torch.empty(shape).uniform_() for name, shape in shapes.items()} for kind in KINDS}
    saves = way(state, folder)
    dist.destroy_process_group()
    return saves


def megagpt(state: State, folder: Path) -> list[Save]:
    """A copy in memory; then, on a thread, files with checksums that are flushed and read back."""
    entries = [
        Entry(name, tuple(weight.shape), Box((0,) * weight.dim(), tuple(weight.shape)), {k: state[k][name] for k in KINDS})
        for name, weight in state["master"].items()
    ]
    saver = Saver(folder / "run", 0, None, None)
    saver.prepare(entries).result()  # as a run does on the thread, beside the steps before its first save
    labels = ("megagpt, first", "megagpt, second", "megagpt, beside products")
    saves = [_megagpt(saver, step, entries, label, folder / "run") for step, label in enumerate(labels)]
    saver.close()
    return saves


def _megagpt(saver: Saver, step: int, entries: list[Entry], label: str, folder: Path) -> Save:
    with clean(folder):
        alone = products_per_second(until(ALONE)) if "beside" in label else None
        news: list[Saved | None] = []

        def ended() -> bool:  # asked as the trainer asks after each step
            news.append(saver.news())
            return news[-1] is not None

        begun = time.perf_counter()
        saver.start(step, entries, {}, {})
        stall = time.perf_counter() - begun
        beside = alone and products_per_second(ended) / alone
        saved = saver.finish() if alone is None else news[-1]
        total = time.perf_counter() - begun
        assert saved is not None and saved.problem is None, saved
        return Save(label, stall, total, size_of(folder), beside)


def torch_save(state: State, folder: Path) -> list[Save]:
    """One file, which is in the system's memory when the call returns: a machine that fails then has no checkpoint."""
    return [_in_one_file(f"torch.save, not flushed, {nth}", state, folder / "file", False) for nth in ("first", "second")]


def torch_save_fsync(state: State, folder: Path) -> list[Save]:
    """One file, flushed to the disk."""
    return [_in_one_file(f"torch.save and fsync, {nth}", state, folder / "file", True) for nth in ("first", "second")]


def dcp_save(state: State, folder: Path) -> list[Save]:
    """Its files are flushed, as is its default."""
    saves = []
    for label in ("dcp.save, first", "dcp.save, second"):
        with clean(folder / "dcp"):
            begun = time.perf_counter()
            dcp.save(state, checkpoint_id=folder / "dcp")
            total = time.perf_counter() - begun
            saves.append(Save(label, total, total, size_of(folder / "dcp")))
    return saves


def dcp_async_save(state: State, folder: Path) -> list[Save]:
    """With a stager that is kept, whose buffers the second save finds; without one each save is like the first."""
    stager = DefaultStager(StagingOptions(False, False, False, False))  # the rest of its options needs CUDA
    saves = []
    for label in ("dcp.async_save, first", "dcp.async_save, second", "dcp.async_save, beside products"):
        with clean(folder / "dcp"):
            alone = products_per_second(until(ALONE)) if "beside" in label else None
            begun = time.perf_counter()
            running = dcp.async_save(state, checkpoint_id=folder / "dcp", async_stager=stager)
            stall = time.perf_counter() - begun
            assert isinstance(running, Future)
            beside = alone and products_per_second(running.done) / alone
            running.result()
            saves.append(Save(label, stall, time.perf_counter() - begun, size_of(folder / "dcp"), beside))
    stager.close()
    return saves


def _in_one_file(label: str, state: State, path: Path, flushed: bool) -> Save:
    with clean(path):
        begun = time.perf_counter()
        with path.open("wb") as file:
            torch.save(state, file)
            if flushed:
                file.flush()
                os.fsync(file.fileno())
        total = time.perf_counter() - begun
        return Save(label, total, total, path.stat().st_size)


@contextmanager
def clean(path: Path) -> Iterator[None]:
    """Begin with nothing to write, end with nothing written."""
    os.sync()
    try:
        yield
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def products_per_second(done: Callable[[], bool]) -> float:
    """Rate of products of two matrices of 512 x 512 until `done`, in place of a training's forwards and backwards."""
    a = torch.rand(512, 512)
    out = torch.empty_like(a)
    count, begun = 0, time.perf_counter()
    while not done():
        torch.mm(a, a, out=out)
        count += 1
    return count / (time.perf_counter() - begun)


def until(seconds: float) -> Callable[[], bool]:
    """True when so much time has passed."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(saves: list[Save]) -> str:
    """One line for each save; ratios are to megagpt's second one."""
    ours = next((save for save in saves if save.label == "megagpt, second"), None)
    lines = [f"{'':34}{'stall s':>9}{'total s':>9}{'GB':>7}{'stall x':>9}{'total x':>9}  speed of products beside it"]
    for save in saves:
        ratios = f"{save.stall / ours.stall:9.2f}{save.total / ours.total:9.2f}" if ours else f"{'':18}"
        beside = f"  {save.speed_beside:.0%}" if save.speed_beside is not None else ""
        lines.append(f"{save.label:34}{save.stall:9.3f}{save.total:9.2f}{save.n_bytes / 1e9:7.2f}{ratios}{beside}")
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    main()
