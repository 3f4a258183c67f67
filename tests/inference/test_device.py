"""Devices are checked by name, and memory is compared before it is allocated."""

import pytest
import torch

from megagpt.errors import ConfigError
from megagpt.inference.device import available_memory, require_memory, select_device

CPU = torch.device("cpu")


def test_auto_selects_a_gpu_if_there_is_one() -> None:
    expected = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    assert select_device("auto") == expected
    assert select_device("cpu") == CPU


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "meta", "cuda:0\n"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda or cuda:N"):
        select_device(name)


def test_a_gpu_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device cuda:999: this machine has "):
        select_device("cuda:999")


def test_free_memory_is_positive_and_below_what_the_machine_has() -> None:
    free = available_memory(CPU)
    assert free is not None and 0 < free < 2**50


def test_too_little_memory_is_an_error_with_both_numbers() -> None:
    require_memory("a model", 1, CPU, "use less")
    with pytest.raises(ConfigError, match=r"^a model: needs 1,000,000,000.0 GB of memory, and .* [0-9.,]+ GB free; use less$"):
        require_memory("a model", 10**18, CPU, "use less")
