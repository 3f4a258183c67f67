"""The one-pass safetensors writer, compared with the safetensors package, which reads its files."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megagpt.checkpoint.files import TensorSpec, sha256_of_file, write_durably, write_safetensors


def test_the_safetensors_package_reads_every_bit_that_was_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a/b@0,3": torch.randn(3, 5, generator=generator),
        "half": torch.randn(7, generator=generator).half(),
        "brain": torch.randn(2, 2, generator=generator).bfloat16(),
        "transposed": torch.randn(4, 6, generator=generator).T,
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
    }
    specs = [TensorSpec(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]
    written = write_safetensors(tmp_path / "f.safetensors", specs, tensors.values(), {"step": "7"})
    loaded = load_file(tmp_path / "f.safetensors")
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(loaded[key], tensor) and loaded[key].dtype == tensor.dtype
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        assert file.metadata() == {"step": "7"}
    content = (tmp_path / "f.safetensors").read_bytes()
    assert written == (len(content), hashlib.sha256(content).hexdigest())
    assert sha256_of_file(tmp_path / "f.safetensors", from_disk=True) == written.sha256


def test_a_tensor_is_requested_only_after_the_previous_one_is_written(tmp_path: Path) -> None:
    """A large model can therefore be written from a generator."""
    specs = [TensorSpec(str(number), torch.float32, (2**20,)) for number in range(4)]
    sizes = []

    def one_by_one() -> Iterator[torch.Tensor]:
        for number in range(4):
            sizes.append((tmp_path / "f").stat().st_size)
            yield torch.full((2**20,), float(number))

    write_safetensors(tmp_path / "f", specs, one_by_one())
    assert [size // 2**22 for size in sizes] == [0, 1, 2, 3]


def test_a_tensor_with_another_shape_than_its_spec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="w: "):
        write_safetensors(tmp_path / "f", [TensorSpec("w", torch.float32, (2, 3))], [torch.zeros(3, 2)])


def test_a_small_file_is_replaced_and_no_temporary_file_is_left(tmp_path: Path) -> None:
    write_durably(tmp_path / "latest", "one\n")
    write_durably(tmp_path / "latest", "two\n")
    assert (tmp_path / "latest").read_text() == "two\n"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
