"""Shard records: together the ranks' shards are the full parameter, and padding of the vocabulary is not part of it."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megagpt.parallel.loss_kernels import unpadded_entries
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import (
    Shard,
    mark_second_copy,
    replicated_parameter,
    set_shard,
    shard_of,
    sharded_parameter,
)


@settings(deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 6), st.integers(1, 5), st.integers(0, 1), st.data())
def test_the_shards_of_all_tensor_ranks_are_consecutive_ranges_of_the_full_parameter(
    tensor: int, rows: int, columns: int, dim: int, data: st.DataObject
) -> None:
    shape = (rows * tensor, columns) if dim == 0 else (columns, rows * tensor)
    end = 0
    for rank in range(tensor):
        parameter = sharded_parameter("name", shape, dim, ParallelContext(tp_rank=rank, tp_size=tensor), std=0.5)
        shard = shard_of(parameter)
        assert shard == Shard("name", shape, dim, start=end, std=0.5, mean=0.0)
        assert parameter.shape[1 - dim] == columns
        end += parameter.shape[dim]
    assert end == shape[dim]


@settings(deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 200), st.sampled_from([1, 16, 64, 128]))
def test_padding_of_the_vocabulary_is_in_the_tensors_but_not_in_the_full_shape(
    tensor: int, vocab_size: int, multiple: int
) -> None:
    multiple *= tensor
    padded = -(-vocab_size // multiple) * multiple
    entries = []
    for rank in range(tensor):
        parallel = ParallelContext(tp_rank=rank, tp_size=tensor)
        parameter = sharded_parameter("name", (padded, 3), 0, parallel, std=1.0, unpadded=vocab_size)
        assert tuple(parameter.shape) == (padded // tensor, 3)
        assert shard_of(parameter).shape == (vocab_size, 3)
        assert shard_of(parameter).start == rank * padded // tensor
        entries.append(unpadded_entries(parameter))
    assert sum(entries) == vocab_size
    assert entries == sorted(entries, reverse=True)  # the padding is at the end


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_replicated_parameter_is_full_on_every_rank_and_knows_if_its_gradient_is_partial(sequence_parallel: bool) -> None:
    for rank in range(2):
        parallel = ParallelContext(tp_rank=rank, tp_size=2, sequence_parallel=sequence_parallel)
        parameter = replicated_parameter("norm.weight", (6,), parallel, mean=1.0)
        assert tuple(parameter.shape) == (6,)
        assert shard_of(parameter) == Shard(
            "norm.weight", (6,), dim=None, start=0, std=0.0, mean=1.0, partial_gradient=sequence_parallel
        )


def test_a_sharded_parameter_has_its_complete_gradient_also_under_sequence_parallelism() -> None:
    parallel = ParallelContext(tp_rank=1, tp_size=2, sequence_parallel=True)
    assert not shard_of(sharded_parameter("name", (4, 4), 0, parallel, std=1.0)).partial_gradient


def test_marking_a_second_copy_changes_nothing_else() -> None:
    parameter = sharded_parameter("name", (4, 4), 0, ParallelContext(), std=1.0)
    before = shard_of(parameter)
    assert not before.second_copy
    mark_second_copy(parameter)
    assert shard_of(parameter) == replace(before, second_copy=True)


def test_a_record_cannot_be_changed_in_place() -> None:
    shard = shard_of(replicated_parameter("name", (2,), ParallelContext()))
    with pytest.raises(FrozenInstanceError):
        shard.start = 1  # type: ignore[misc]


def test_a_module_s_parameters_keep_their_records_in_another_dtype_and_under_requires_grad() -> None:
    module = nn.Module()
    module.weight = sharded_parameter("name", (4, 2), 0, ParallelContext(tp_rank=1, tp_size=2), std=1.0)
    shard = shard_of(module.weight)
    module.to(torch.bfloat16).requires_grad_(False)
    assert module.weight.dtype == torch.bfloat16 and shard_of(module.weight) is shard


def test_a_parameter_without_a_record_is_an_error() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(AttributeError):
        shard_of(parameter)
    set_shard(parameter, Shard("name", (2,), None, 0, 0.0, 0.0))
    assert shard_of(parameter).name == "name"
