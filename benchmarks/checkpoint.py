"""Measure how long a save blocks training and how long it takes: megagpt, torch.save, torch.distributed.checkpoint.

    python benchmarks/checkpoint.py --parameters-config configs/350M.json

The state is that of one process that trains the config's model with Adam: fp32 weights and two moments, random values.
Each method saves it twice, because the first save allocates buffers that the second one reuses. Methods that write in the
background save once more while matrix products run; the speed of the products shows how much of the machine is left for
training. Each method runs in its own process, so that buffers and pages of one method cannot affect the next, and starts
when the disk has nothing left to write. The files are deleted after each save.
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
from megagpt.checkpoint.save import AsyncSaver, Entry, SaveResult
from megagpt.config import load_config
from megagpt.model.meta_model import meta_model
from megagpt.parallel.parameter import shard_of

STATES = ("master", "exp_avg", "exp_avg_sq")
SPARE = 2 * 10**9
"""Bytes of memory needed besides the state and a copy of it: torch, and pages that are not yet on disk."""
BASELINE = 5.0
"""Seconds that the matrix products are timed without a save."""
State = dict[str, dict[str, torch.Tensor]]
"""State name -> parameter name -> values."""


class Save(NamedTuple):
    """Times of one save."""

    label: str
    stall: float
    """Seconds that training would have waited."""
    total: float
    """Seconds until the save has finished."""
    n_bytes: int
    """Total size of the files."""
    relative_speed: float | None = None
    """Speed of matrix products during a background save, relative to their speed without one."""


def main() -> None:
    """Print a table of all methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters-config", default="configs/350M.json", help="config whose model gives the shapes")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="folder on the disk to test (default /var/tmp)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads, for copies and matrix products (default 1)")
    args = parser.parse_args()
    shapes = parameter_shapes(args.parameters_config)
    n_parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    n_bytes = n_parameters * len(STATES) * torch.float32.itemsize
    problem = resource_problem(args.folder, n_bytes)
    if problem is not None:
        sys.exit(f"error: {problem}")
    print(f"{n_parameters / 1e6:.1f}M parameters, {n_bytes / 1e9:.2f} GB of state, {args.threads} thread(s)", flush=True)
    saves: list[Save] = []
    for method in (megagpt, torch_save, torch_save_fsync, dcp_save, dcp_async_save):
        with (
            tempfile.TemporaryDirectory(dir=args.folder) as folder,
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
        ):
            try:
                results = process.submit(run_method, method, shapes, Path(folder), args.threads).result()
            except Exception as error:  # the results of the other methods are still useful
                print(f"{method.__name__}: failed: {type(error).__name__}: {error}", flush=True)
                continue
        for save in results:
            print(f"{save.label}: stall {save.stall:.3f} s, total {save.total:.1f} s", flush=True)
        saves += results
    print(table(saves))


def parameter_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Return parameter name -> full shape of a config's model, without allocating weights."""
    model = meta_model(load_config(path))
    return {shard_of(parameter).name: shard_of(parameter).shape for parameter in model.parameters()}


def resource_problem(folder: Path, n_bytes: int) -> str | None:
    """Return why the folder or the machine is not sufficient, or None."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    _, kind = max((mount for mount in mounts if folder.resolve().is_relative_to(mount[0])), key=lambda mount: len(mount[0]))
    if kind in ("tmpfs", "ramfs"):
        return f"{folder} is in memory ({kind}); pass a --folder on a disk"
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    memory, disk = int(lines["MemAvailable"].split()[0]) * 1024, shutil.disk_usage(folder).free
    if memory < 2 * n_bytes + SPARE:  # a background save writes from a copy
        return f"{memory / 1e9:.1f} GB of memory are available, {(2 * n_bytes + SPARE) / 1e9:.1f} GB are needed"
    if disk < 1.1 * n_bytes:
        return f"{disk / 1e9:.1f} GB are free in {folder}, {1.1 * n_bytes / 1e9:.1f} GB are needed"
    return None


def run_method(
    method: Callable[[State, Path], list[Save]], shapes: dict[str, tuple[int, ...]], folder: Path, threads: int
) -> list[Save]:
    """Create the state and save it; runs in a process of its own."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = {name: {parameter: torch.empty(shape).uniform_() for parameter, shape in shapes.items()} for name in STATES}
    saves = method(state, folder)
    dist.destroy_process_group()
    return saves


def megagpt(state: State, folder: Path) -> list[Save]:
    """Copy to memory; a thread then writes files with checksums, flushes them and reads them back."""
    entries = [
        Entry(name, tuple(weight.shape), Box.full(tuple(weight.shape)), {s: state[s][name] for s in STATES})
        for name, weight in state["master"].items()
    ]
    saver = AsyncSaver(folder / "run", 0, None, None)
    saver.prepare(entries).result()  # a training run does this on the thread, during the steps before its first save
    labels = ("megagpt, first", "megagpt, second", "megagpt, beside products")
    saves = [_megagpt(saver, step, entries, label, folder / "run") for step, label in enumerate(labels)]
    saver.close()
    return saves


def _megagpt(saver: AsyncSaver, step: int, entries: list[Entry], label: str, folder: Path) -> Save:
    with clean(folder):
        baseline = products_per_second(after(BASELINE)) if "beside" in label else None
        results: list[SaveResult] = []

        def finished() -> bool:  # polled like the trainer does after each step
            result = saver.poll()
            if result is not None:
                results.append(result)
            return result is not None

        start = time.perf_counter()
        saver.start(step, entries, {}, {})
        stall = time.perf_counter() - start
        relative_speed = None
        if baseline is not None:
            relative_speed = products_per_second(finished) / baseline
        saved = results[0] if results else saver.finish()
        total = time.perf_counter() - start
        assert saved is not None and saved.problem is None, saved
        return Save(label, stall, total, size_of(folder), relative_speed)


def torch_save(state: State, folder: Path) -> list[Save]:
    """Write one file. When the call returns it is only in the page cache: after a power failure there is no checkpoint."""
    return [_one_file(f"torch.save, not flushed, {nth}", state, folder / "file", False) for nth in ("first", "second")]


def torch_save_fsync(state: State, folder: Path) -> list[Save]:
    """Write one file and flush it to disk."""
    return [_one_file(f"torch.save and fsync, {nth}", state, folder / "file", True) for nth in ("first", "second")]


def dcp_save(state: State, folder: Path) -> list[Save]:
    """Save synchronously; files are flushed to disk by default."""
    saves = []
    for label in ("dcp.save, first", "dcp.save, second"):
        with clean(folder / "dcp"):
            start = time.perf_counter()
            dcp.save(state, checkpoint_id=folder / "dcp")
            total = time.perf_counter() - start
            saves.append(Save(label, total, total, size_of(folder / "dcp")))
    return saves


def dcp_async_save(state: State, folder: Path) -> list[Save]:
    """Save in the background, with one stager for all saves: its buffers are reused, else each save is like the first."""
    stager = DefaultStager(StagingOptions(False, False, False, False))  # its other options need CUDA
    saves = []
    for label in ("dcp.async_save, first", "dcp.async_save, second", "dcp.async_save, beside products"):
        with clean(folder / "dcp"):
            baseline = products_per_second(after(BASELINE)) if "beside" in label else None
            start = time.perf_counter()
            running = dcp.async_save(state, checkpoint_id=folder / "dcp", async_stager=stager)
            stall = time.perf_counter() - start
            assert isinstance(running, Future)
            relative_speed = None
            if baseline is not None:
                relative_speed = products_per_second(running.done) / baseline
            running.result()
            saves.append(Save(label, stall, time.perf_counter() - start, size_of(folder / "dcp"), relative_speed))
    stager.close()
    return saves


def _one_file(label: str, state: State, path: Path, flush: bool) -> Save:
    with clean(path):
        start = time.perf_counter()
        with path.open("wb") as file:
            torch.save(state, file)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        total = time.perf_counter() - start
        return Save(label, total, total, path.stat().st_size)


@contextmanager
def clean(path: Path) -> Iterator[None]:
    """Start with nothing left to write to disk, and delete `path` at the end."""
    os.sync()
    try:
        yield
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def products_per_second(done: Callable[[], bool]) -> float:
    """Return the rate of products of two 512 x 512 matrices until `done`; they take the place of training."""
    a = torch.rand(512, 512)
    out = torch.empty_like(a)
    count, start = 0, time.perf_counter()
    while not done():
        torch.mm(a, a, out=out)
        count += 1
    return count / (time.perf_counter() - start)


def after(seconds: float) -> Callable[[], bool]:
    """Return a function that returns True once `seconds` have passed."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end


def size_of(folder: Path) -> int:
    """Return the total size of all files in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(saves: list[Save]) -> str:
    """Format one line per save; the ratios are relative to megagpt's second save."""
    reference = next((save for save in saves if save.label == "megagpt, second"), None)
    lines = [f"{'':34}{'stall s':>9}{'total s':>9}{'GB':>7}{'stall x':>9}{'total x':>9}  speed of products during the save"]
    for save in saves:
        ratios = f"{'':18}"
        if reference is not None:
            ratios = f"{save.stall / reference.stall:9.2f}{save.total / reference.total:9.2f}"
        speed = f"  {save.relative_speed:.0%}" if save.relative_speed is not None else ""
        lines.append(f"{save.label:34}{save.stall:9.3f}{save.total:9.2f}{save.n_bytes / 1e9:7.2f}{ratios}{speed}")
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    main()
