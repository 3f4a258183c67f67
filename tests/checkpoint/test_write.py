"""Checkpoints written by one process without a process group, as converters write them."""

import gc
import json
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from support.runs import tiny_config

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.load import CheckpointReader
from megagpt.checkpoint.verify import local_problems
from megagpt.checkpoint.write import TensorSource, write_checkpoint
from megagpt.commands import inspect_checkpoint
from megagpt.config import to_json
from megagpt.errors import CheckpointError, StorageError

CONFIG: dict[str, Any] = json.loads(to_json(tiny_config(training={"precision": "bf16"})))
STATE: dict[str, Any] = {"consumed_samples": 40, "optimizer": "adamw", "optimizer_step": 5, "loss_scaler": {}}
SHAPES = {"experts.up": (3, 4, 5), "experts.down": (3, 5, 4), "norm.weight": (7,), "embedding": (6, 4)}


def values_of(name: str, state: str = "master") -> torch.Tensor:
    """Random values that depend on the names only."""
    generator = torch.Generator().manual_seed(sum(f"{state} {name}".encode()))
    return torch.randn(SHAPES[name], generator=generator)


def sources(states: tuple[str, ...] = ("master",)) -> Iterator[TensorSource]:
    for name, shape in SHAPES.items():
        yield TensorSource(name, shape, {state: partial(values_of, name, state) for state in states})


def ones(name: str, *shape: int, offset: tuple[int, ...] | None = None, size: tuple[int, ...] = ()) -> TensorSource:
    """A tensor of ones, or a box of it."""
    box = None if offset is None else Box(offset, size)
    return TensorSource(name, shape, {"master": torch.ones(shape if box is None else box.size)}, box)


def write(folder: Path, tensors: Iterable[TensorSource], **options: int) -> Path:
    return write_checkpoint(folder, 5, tensors, CONFIG, STATE, **options)


def test_a_checkpoint_written_without_a_process_group_is_complete_and_reads_back_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert not dist.is_initialized()
    folder = write(tmp_path / "run", sources(("master", "exp_avg", "exp_avg_sq")))
    assert folder == tmp_path / "run" / "step_00000005"
    assert (tmp_path / "run" / "latest").read_text() == "step_00000005\n"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["latest", "step_00000005"]
    assert local_problems(folder) == []
    reader = CheckpointReader(folder)
    assert (reader.manifest.step, reader.manifest.config, reader.manifest.state) == (5, CONFIG, STATE)
    for name, shape in SHAPES.items():
        for state in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(reader.read(state, name, Box.full(shape)), values_of(name, state))
    middle = Box((1, 2, 1), (2, 2, 3))
    assert torch.equal(reader.read("master", "experts.up", middle), values_of("experts.up")[1:3, 2:4, 1:4])
    assert inspect_checkpoint.main([str(tmp_path / "run"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["step"], report["samples"], report["optimizer_step"], report["files"]) == (5, 40, 5, 1)
    assert report["parameters"] == 60 + 60 + 7 + 24
    norms = {tensor["name"]: tensor["norm"] for tensor in report["tensors"]}
    assert norms == {name: pytest.approx(values_of(name).double().norm().item(), rel=1e-12) for name in SHAPES}


@pytest.mark.parametrize(("limit", "files"), [(1, 4), (4 * 67, 3), (4 * 127, 2), (4 * 151, 1)])
def test_files_are_split_at_the_size_limit(limit: int, files: int, tmp_path: Path) -> None:
    folder = write(tmp_path, sources(), max_file_bytes=limit)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names == [f"rank_{number:05d}.safetensors" for number in range(files)]
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            n_bytes = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
            assert n_bytes <= limit or len(file.keys()) == 1
    assert local_problems(folder) == []
    reader = CheckpointReader(folder)
    for name, shape in SHAPES.items():
        assert torch.equal(reader.read("master", name, Box.full(shape)), values_of(name))


def test_only_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    counts = []

    def build(dtype: torch.dtype) -> torch.Tensor:
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
        tensor = torch.ones(8, 8, dtype=dtype)
        alive.append(weakref.ref(tensor))
        return tensor

    dtypes = (torch.float32, torch.bfloat16)
    tensors = (
        TensorSource(f"w{n}", (8, 8), {"master": partial(build, dtypes[n % 2]), "exp_avg": partial(build, dtypes[n % 2])})
        for n in range(10)
    )
    write(tmp_path, tensors, max_file_bytes=4 * 64 * 2 * 4)
    assert counts == [0] * 20


def test_tensors_of_a_finished_file_are_freed_even_if_they_were_passed_directly(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    counts = []

    def build() -> Iterator[TensorSource]:
        for n in range(9):
            gc.collect()
            counts.append(sum(ref() is not None for ref in alive))
            tensor = torch.ones(8, 8)
            alive.append(weakref.ref(tensor))
            yield TensorSource(f"w{n}", (8, 8), {"master": tensor})
            del tensor

    write(tmp_path, build(), max_file_bytes=4 * 64 * 3)
    assert max(counts) <= 4  # a file of three tensors, and the one that did not fit


def test_other_dtypes_and_views_are_saved_as_fp32(tmp_path: Path) -> None:
    values = torch.arange(12).view(3, 4).to(torch.bfloat16).T.requires_grad_()
    folder = write(tmp_path, [TensorSource("w", (4, 3), {"master": values})])
    assert torch.equal(CheckpointReader(folder).read("master", "w", Box.full((4, 3))), values.detach().float())
    assert local_problems(folder) == []


def test_a_tensor_can_be_written_box_by_box(tmp_path: Path) -> None:
    full = torch.arange(2 * 6 * 4).view(2, 6, 4).float()
    boxes = [Box((0, first, 0), (2, 2, 4)) for first in (4, 0, 2)]
    tensors = [TensorSource("w", (2, 6, 4), {"master": full[box.within(Box.full((2, 6, 4)))]}, box) for box in boxes]
    folder = write(tmp_path, tensors, max_file_bytes=1)
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert torch.equal(CheckpointReader(folder).read("master", "w", Box.full((2, 6, 4))), full)


def unreadable() -> torch.Tensor:
    raise FileNotFoundError(2, "No such file or directory", "source.bin")


def no_weight() -> TensorSource:
    return TensorSource("a", (2,), {"exp_avg": torch.ones(2)})


FAULTS: dict[str, tuple[Callable[[], Iterable[TensorSource]], str]] = {
    "the same tensor twice": (lambda: [ones("a", 2), ones("b", 2), ones("a", 2)], "a: its values at [0] are given twice"),
    "boxes that overlap": (
        lambda: [ones("a", 4, offset=(0,), size=(3,)), ones("a", 4, offset=(2,), size=(2,))],
        "a: its boxes of size [3] at [0] and [2] at [2] overlap",
    ),
    "a gap": (lambda: [ones("a", 4, offset=(0,), size=(3,))], "a: 1 of 4 values are in no box"),
    "a box outside the tensor": (lambda: [ones("a", 4, offset=(2,), size=(3,))], "a: the box of size [3] at [2] is not inside"),
    "another shape than announced": (
        lambda: [TensorSource("a", (2, 3), {"master": lambda: torch.ones(3, 2)})],
        "a: master has shape [3, 2], expected [2, 3]",
    ),
    "two shapes": (
        lambda: [ones("a", 4, offset=(0,), size=(2,)), ones("a", 5, offset=(2,), size=(3,))],
        "a: given with shape [4] and with shape [5]",
    ),
    "two lists of states": (
        lambda: [
            ones("a", 4, offset=(0,), size=(2,)),
            TensorSource("a", (4,), {"master": torch.ones(2), "exp_avg": torch.ones(2)}, Box((2,), (2,))),
        ],
        "a: given with states master and with master, exp_avg",
    ),
    "no weight": (lambda: [no_weight()], "a: the weight, state 'master', is missing; only exp_avg is given"),
    "no tensors": (list, "there are no tensors"),
    "a scalar": (lambda: [ones("a")], "a: its shape is []; expected at least one dim"),
    "a source that cannot be read": (
        lambda: [ones("a", 2), TensorSource("b", (2,), {"master": unreadable})],
        "No such file or directory: 'source.bin'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_leaves_nothing_behind(fault: str, tmp_path: Path) -> None:
    tensors, message = FAULTS[fault]
    with pytest.raises(CheckpointError) as error:
        write(tmp_path, tensors())
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_converter_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken() -> Iterator[TensorSource]:
        yield ones("a", 2)
        raise KeyError("b")

    with pytest.raises(KeyError):
        write(tmp_path, broken(), max_file_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    folder = write(tmp_path, [ones("a", 2)])
    content = (folder / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="step_00000005: exists already"):
        write(tmp_path, [ones("b", 2)])
    assert (folder / "manifest.json").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000005"]


def test_a_folder_that_cannot_be_created_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="step_00000005: not written: .*Not a directory"):
        write(tmp_path / "file", [ones("a", 2)])
