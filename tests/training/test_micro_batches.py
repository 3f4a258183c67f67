"""Token batches become inputs and labels on the host, with one copy per tensor to the device."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.runs import tiny_config

from megagpt.config import Config
from megagpt.data.sampler import TokenBatch
from megagpt.labels import IGNORED
from megagpt.parallel.topology import Layout, Topology
from megagpt.training.micro_batches import HostBatch, global_batches, positions_in_document, to_host_batch

SINGLE = Topology()
MASKED = {"mask_document_ends": True}


def host_config(**data: Any) -> Config:
    """Return a config with micro-batches of 2 sequences of 16 tokens."""
    return tiny_config(data=data)


def token_batches(count: int = 3) -> list[TokenBatch]:
    """Return micro-batches of 2 samples of 17 random tokens, with document starts in different places."""
    generator = np.random.default_rng(0)
    return [
        TokenBatch(first, generator.integers(0, 61, (2, 17)), generator.random((2, 17)) < 0.3)
        for first in range(0, 2 * count, 2)
    ]


def test_labels_are_the_inputs_shifted_by_one_token() -> None:
    batches = token_batches()
    host = to_host_batch(batches, host_config(), SINGLE)
    rows = np.concatenate([batch.tokens for batch in batches])
    assert torch.equal(host.tokens, torch.from_numpy(rows[:, :-1]))
    assert torch.equal(host.labels, torch.from_numpy(rows[:, 1:]))
    assert host.positions is None and host.documents is None


def test_a_document_start_is_no_label_if_the_config_says_so() -> None:
    batches = token_batches()
    host = to_host_batch(batches, host_config(**MASKED), SINGLE)
    starts = torch.from_numpy(np.concatenate([batch.starts for batch in batches]))[:, 1:]
    assert bool((host.labels[starts] == IGNORED).all()) and bool((host.labels[~starts] != IGNORED).all())


@pytest.mark.parametrize("data", [{}, MASKED])
@pytest.mark.parametrize("context", [1, 2, 4])
def test_the_token_count_is_a_host_number_equal_to_the_unmasked_labels(data: dict[str, bool], context: int) -> None:
    batches, counts = token_batches(), []
    for rank in range(context):
        host = to_host_batch(batches, host_config(**data), Topology(Layout(context=context), rank))
        assert type(host.n_tokens) is int
        assert host.n_tokens == int((host.labels != IGNORED).sum())
        counts.append(host.n_tokens)
    assert sum(counts) == to_host_batch(batches, host_config(**data), SINGLE).n_tokens


def test_a_batch_without_any_label_has_no_tokens() -> None:
    batch = TokenBatch(0, np.zeros((2, 17), np.int64), np.ones((2, 17), bool))
    assert to_host_batch([batch], host_config(**MASKED), SINGLE).n_tokens == 0


@pytest.mark.parametrize("context", [1, 2])
def test_each_kind_of_data_is_one_contiguous_tensor(context: int) -> None:
    config = host_config(mask_document_ends=True, reset_positions=True, reset_attention=True)
    host = to_host_batch(token_batches(), config, Topology(Layout(context=context), 0))
    for tensor in (host.tokens, host.labels, host.positions, host.documents):
        assert tensor is not None and tensor.is_contiguous()
    assert host.tokens.shape == host.labels.shape == (6, 16 // context)
    micro_batches = host.to(torch.device("cpu"))
    for name in ("samples", "tokens", "labels", "positions", "documents"):
        storages = {getattr(batch, name).untyped_storage().data_ptr() for batch in micro_batches}
        assert len(storages) == 1, name  # views of one tensor: one copy to the device for all micro-batches


def test_memory_is_pinned_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Size] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.shape)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)  # which needs a GPU
    config = host_config(reset_positions=True, reset_attention=True)
    to_host_batch(token_batches(), config, SINGLE)
    assert pinned == []
    to_host_batch(token_batches(), config, SINGLE, pin_memory=True)
    assert sorted(pinned) == [torch.Size((6,))] + [torch.Size((6, 16))] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches_reach_a_gpu_unchanged() -> None:
    host = to_host_batch(token_batches(), host_config(), SINGLE, pin_memory=True)
    assert host.tokens.is_pinned() and host.labels.is_pinned()
    on_gpu = host.to(torch.device("cuda", 0))
    torch.cuda.synchronize()
    assert torch.equal(torch.cat([batch.tokens for batch in on_gpu]).cpu(), host.tokens)


def test_micro_batches_have_the_rows_of_their_token_batches_and_the_numbers_of_their_samples() -> None:
    batches = token_batches()[1:]  # as on a rank that does not have the first micro-batch
    config = host_config(reset_positions=True, reset_attention=True)
    micro_batches = to_host_batch(batches, config, SINGLE).to(torch.device("cpu"))
    assert len(micro_batches) == 2
    for source, batch in zip(batches, micro_batches, strict=True):
        assert np.array_equal(batch.tokens, source.tokens[:, :-1])
        assert np.array_equal(batch.labels, source.tokens[:, 1:])
        assert batch.samples is not None and batch.samples.tolist() == [source.first_sample, source.first_sample + 1]
        assert np.array_equal(batch.positions, positions_in_document(source.starts[:, :-1]))
        assert np.array_equal(batch.documents, np.cumsum(source.starts[:, :-1], 1))


def test_context_ranks_get_consecutive_ranges_of_the_tokens_and_all_positions_and_documents() -> None:
    config = host_config(reset_positions=True, reset_attention=True)
    full = to_host_batch(token_batches(), config, SINGLE)
    shares = [to_host_batch(token_batches(), config, Topology(Layout(context=2), rank)) for rank in range(2)]
    assert torch.equal(torch.cat([share.tokens for share in shares], 1), full.tokens)
    assert torch.equal(torch.cat([share.labels for share in shares], 1), full.labels)
    for share in shares:
        assert torch.equal(share.positions, full.positions) and torch.equal(share.documents, full.documents)  # type: ignore[arg-type]


def test_a_batch_knows_its_samples() -> None:
    host = to_host_batch(token_batches(), host_config(), SINGLE, first_sample=40, size=12)
    assert (host.first_sample, host.size) == (40, 12)
    default: HostBatch = to_host_batch(token_batches(), host_config(), SINGLE)
    assert (default.first_sample, default.size) == (0, 16)


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_positions_count_from_the_last_document_start(starts: list[list[bool]]) -> None:
    expected = []
    for row in starts:
        position, positions = -1, []
        for start in row:
            position = 0 if start else position + 1
            positions.append(position)
        expected.append(positions)
    assert positions_in_document(np.array(starts)).tolist() == expected


class SampleIndices:
    """A dataset whose samples contain their index."""

    samples_per_epoch = 100

    def sample(self, index: int) -> Any:
        return TokenBatch(index, np.array([index, index]), np.zeros(2, bool))


def test_data_parallel_ranks_share_the_global_batch_and_other_ranks_of_a_replica_read_the_same_samples() -> None:
    layout, dataset = Layout(tensor=2, pipeline=2, context=2, data=2), SampleIndices()
    samples = {}
    for rank in range(layout.world_size):
        topology = Topology(layout, rank)
        batches = global_batches(dataset, host_config(), topology, 2).micro_batches(16)
        assert [batch.first_sample for batch in batches] == [int(batch.tokens[0][0]) for batch in batches]
        samples[rank] = [int(tokens[0]) for batch in batches for tokens in batch.tokens]
        assert samples[rank] == list(range(16 + 8 * topology.dp_rank, 24 + 8 * topology.dp_rank))
    assert len(set(map(tuple, samples.values()))) == 2


@pytest.mark.parametrize("context", [1, 2])
def test_sources_follow_their_samples_into_the_micro_batches(context: int) -> None:
    """A context rank gets its range of the positions, and all lengths."""
    batches = [
        replace(batch, source=np.arange(8).reshape(1, 8) + batch.first_sample + [[0], [1]], source_lengths=np.array([8, 3]))
        for batch in token_batches()
    ]
    parts = []
    for rank in range(context):
        host = to_host_batch(batches, host_config(), Topology(Layout(context=context), rank))
        micro_batches = host.to(torch.device("cpu"))
        assert all(batch.source_lengths is not None and batch.source_lengths.tolist() == [8, 3] for batch in micro_batches)
        parts.append(torch.cat([batch.source for batch in micro_batches if batch.source is not None]))
    assert torch.equal(torch.cat(parts, 1), torch.arange(6).unsqueeze(1) + torch.arange(8))
