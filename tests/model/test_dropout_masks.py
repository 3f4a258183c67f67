"""Dropout masks are fixed numbers, and as independent as coin flips.

The hash is compared with numpy's unsigned integers. The statistical tests use fixed keys, so they never fail by chance;
their limits are those of a correct generator at five standard deviations, or a wide margin for the deviation itself.
"""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megagpt.model.dropout_masks import keep_mask, token_keys

P = 0.1
int64s = st.integers(-(2**63), 2**63 - 1)


def numpy_mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of MurmurHash3 for 64 bits."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def numpy_uniform(keys: npt.NDArray[np.uint64], columns: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) from keys and columns: two rounds of lowbias32, half of the key before each; signed."""
    x = keys.astype(np.uint32) ^ columns
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = x ^ (keys >> np.uint64(32)).astype(np.uint32)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x.view(np.int32) / 2.0**32 + 0.5


def table(samples: range, length: int, columns: int, seed: int = 1, site: int = 0) -> Tensor:
    """Return a mask as 0 and 1, [rows, columns]."""
    keys = token_keys(seed, torch.tensor(samples), length).flatten() ^ site
    return keep_mask(keys.unsqueeze(1), torch.arange(columns, dtype=torch.int32), P).double()


def scores(first: Tensor, second: Tensor) -> Tensor:
    """Return the correlations of all pairs of columns of two tables, in standard deviations of independent ones."""
    rows = first.shape[0]
    return (first - (1 - P)).T @ (second - (1 - P)) / (P * (1 - P)) / rows * rows**0.5


@given(int64s, st.lists(st.integers(0, 2**40), min_size=1, max_size=3), st.floats(0, 0.999999))
def test_masks_are_those_of_unsigned_arithmetic_in_numpy(seed: int, samples: list[int], probability: float) -> None:
    keys = token_keys(seed, torch.tensor(samples), 5)
    unsigned = np.array([(sample + seed) % 2**64 for sample in samples], np.uint64)
    with np.errstate(over="ignore"):
        expected = numpy_mix64(numpy_mix64(unsigned)[:, None] + np.arange(5, dtype=np.uint64))
    assert np.array_equal(keys.numpy().view(np.uint64), expected)
    columns = np.array([0, 1, 2, 768, 2**31 - 1], np.uint32)
    mask = keep_mask(keys.unsqueeze(2), torch.from_numpy(columns.astype(np.int32)), probability)
    assert np.array_equal(mask.numpy(), numpy_uniform(expected[..., None], columns) >= round(probability * 2**32) / 2**32)


def test_masks_are_the_same_in_every_version_so_that_a_run_can_be_repeated() -> None:
    assert token_keys(1234, torch.tensor([0, 10**9]), 2).tolist() == [
        [5703116469803814616, -5308248217554957735],
        [-3082609234584725837, -2462831944064004983],
    ]
    assert ["".join(map(str, row.tolist())) for row in table(range(1), 4, 32).int()] == [
        "11110111110111111111110111110111",
        "11111111111111111111111111011011",
        "11110111111101111011111111111111",
        "11011111111111111111111111111111",
    ]


def test_a_rank_computes_any_part_of_a_mask_alone() -> None:
    full = table(range(4), 16, 64)
    assert torch.equal(table(range(2, 4), 16, 64), full[32:])
    keys = token_keys(1, torch.arange(4), 16)[1:3, 5:9]
    part = keep_mask(keys.unsqueeze(2), torch.arange(10, 20, dtype=torch.int32), P)
    assert torch.equal(part, full.view(4, 16, 64)[1:3, 5:9, 10:20].bool())


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_the_share_of_dropped_elements_is_the_probability(probability: float) -> None:
    keys = token_keys(1, torch.arange(64), 64)
    dropped = (~keep_mask(keys.unsqueeze(2), torch.arange(256, dtype=torch.int32), probability)).double()
    deviation = (probability * (1 - probability) / dropped.numel()) ** 0.5
    assert abs(dropped.mean().item() - probability) < 5 * deviation


def test_extreme_probabilities_are_possible() -> None:
    keys, columns = token_keys(1, torch.arange(8), 64).unsqueeze(2), torch.arange(64, dtype=torch.int32)
    assert keep_mask(keys, columns, 1e-12).all()
    assert not keep_mask(keys, columns, 1 - 1e-12).any()


def test_counts_in_rows_and_columns_vary_as_binomial_counts_do() -> None:
    """The chi-square statistic of n counts has mean n and variance 2 n."""
    mask = table(range(256), 64, 256)
    for dim in (0, 1):
        counts, trials = mask.sum(dim), mask.shape[dim]
        chi_square = ((counts - trials * (1 - P)) ** 2).sum().item() / (trials * P * (1 - P))
        assert abs(chi_square - len(counts)) < 5 * (2 * len(counts)) ** 0.5


@pytest.mark.parametrize(
    "changed", [{"samples": range(128, 256)}, {"seed": 2}, {"site": 0x1234567890ABCDEF}, {"site": -0x7654321FEDCBA98}]
)
def test_columns_are_independent_of_those_of_other_samples_seeds_and_sites(changed: dict[str, int]) -> None:
    """All 16,384 pairs of columns: standard deviation 1 of the correlations, none beyond five."""
    arguments = {"samples": range(128), "length": 64, "columns": 128}
    pairs = scores(table(**arguments), table(**{**arguments, **changed}))  # type: ignore[arg-type]
    assert pairs.std().item() == pytest.approx(1, abs=0.05) and pairs.abs().max() < 5


def test_columns_and_rows_of_one_table_are_independent_of_each_other() -> None:
    for mask in (table(range(128), 64, 128), table(range(2), 64, 8192).T):
        pairs = scores(mask, mask)
        others = pairs[~torch.eye(len(pairs), dtype=torch.bool)]
        assert others.std().item() == pytest.approx(1, abs=0.05) and others.abs().max() < 5


def test_neighbouring_rows_and_columns_have_no_common_pattern() -> None:
    """The product of the four deviations in each 2 x 2 square has mean 0, and variance (p (1 - p))^4."""
    deviations = table(range(256), 64, 256) - (1 - P)
    squares = deviations[1:, 1:] * deviations[:-1, 1:] * deviations[1:, :-1] * deviations[:-1, :-1]
    assert abs(squares.mean().item()) < 5 * (P * (1 - P)) ** 2 / squares.numel() ** 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_same_bits() -> None:
    keys, columns = token_keys(1, torch.arange(8), 64), torch.arange(512, dtype=torch.int32)
    on_gpu = token_keys(1, torch.arange(8, device="cuda"), 64)
    assert torch.equal(on_gpu.cpu(), keys)
    mask = keep_mask(on_gpu.unsqueeze(2), columns.cuda(), P)
    assert torch.equal(mask.cpu(), keep_mask(keys.unsqueeze(2), columns, P))
