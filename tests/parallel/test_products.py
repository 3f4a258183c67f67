"""8-bit products: their errors are those of the formats, and a layout changes them by rounding only."""

from typing import Any

import pytest
import torch
from support.pool import Pool
from support.runs import Tree, tiny_config, train

from megagpt.config import Config
from megagpt.errors import ConfigError
from megagpt.parallel import products
from megagpt.parallel.kernels import Kernels
from megagpt.parallel.products import Fp8Products, quantize, require_fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
HALF_STEP = {E4M3: 2**-4, E5M2: 2**-3}
"""Largest relative rounding error of a value that is not subnormal: 3 and 2 bits after the leading one."""


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1.0, 448.0, 1e20])
def test_a_row_is_rounded_as_its_format_says_whatever_its_size(dtype: torch.dtype, factor: float) -> None:
    x = random(8, 64) * factor
    rounded, scale = quantize(x, dtype)
    assert rounded.isfinite().all() if dtype is E5M2 else not rounded.float().isnan().any()
    assert torch.equal(scale, 2 ** scale.log2().round()), "scales are powers of two"
    large = x.abs() > x.abs().amax(1, keepdim=True) * 2**-12
    error = (rounded.double() * scale.double() - x.double()).abs() / x.double().abs()
    assert error[large].max() <= HALF_STEP[dtype]
    assert (rounded.float().abs().amax(1) > torch.finfo(dtype).max / 4).all(), "the range is used"


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_row_of_zeros_stays_zero(dtype: torch.dtype) -> None:
    rounded, scale = quantize(torch.zeros(2, 16), dtype)
    assert (rounded.float() == 0).all() and scale.isfinite().all() and (1 / scale).isfinite().all()


@pytest.mark.parametrize("n_rows", [32, 7])
def test_products_differ_from_float64_by_the_rounding_of_their_factors(n_rows: int) -> None:
    """Independent errors of uniform size: half a step / sqrt(3) for each factor, on a result of the same random signs."""
    x, weight, bias = random(2, n_rows, 64), random(48, 64, seed=1), random(48, seed=2)
    grad = random(2, n_rows, 48, seed=3)
    fp8 = Fp8Products(Kernels())
    for actual, exact, formats in (
        (fp8.output(x, weight, bias), x.double() @ weight.double().t() + bias.double(), (E4M3, E4M3)),
        (fp8.input_gradient(grad, weight), grad.double() @ weight.double(), (E5M2, E4M3)),
    ):
        bound = sum(HALF_STEP[kind] ** 2 / 3 for kind in formats) ** 0.5
        error = (actual.double() - exact).norm() / exact.norm()
        assert bound / 5 < error < bound, "exact products would be no 8-bit products"
        assert actual.shape == exact.shape and actual.dtype == x.dtype


def test_a_row_that_is_split_over_ranks_is_rounded_to_the_same_values() -> None:
    """With scales that are no powers of two, the halves would be rounded otherwise."""
    x = random(16, 64)
    x[:, :32] *= 37.0
    together, scale = quantize(x, E4M3)
    for part in (slice(0, 32), slice(32, 64)):
        alone, own_scale = quantize(x[:, part], E4M3)
        expected = together[:, part].float() * scale
        normal = expected.abs() >= scale * 2**-6
        assert torch.equal((alone.float() * own_scale)[normal], expected[normal]) and normal.float().mean() > 0.95


MODEL: Tree = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 16}
SGD: Tree = {"type": "sgd", "learning_rate": 0.1, "clip_grad": 0.0, "weight_decay": 0.0}


def losses(results: list[Any]) -> Any:
    return pytest.approx(results[0]["losses"], rel=2e-3)


def run_of(precision: str, **sections: Tree) -> Config:
    return tiny_config(model=MODEL, optimizer=SGD, training={"precision": precision, "micro_batch_size": 2}, **sections)


def test_ranks_train_as_one_process_and_close_to_bf16(ranks: Pool) -> None:
    """Losses of about 4. A layout changes bf16 sums by 2^-9 and few roundings to 8 bits; 8 bits change the third digit."""
    single = ranks.run(1, train, run_of("fp8"), 2)
    parallel = {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "schedule": "zb_h1"}
    several = ranks.run(4, train, run_of("fp8", parallel=parallel, zero={"stage": 2}), 2)
    bf16 = ranks.run(1, train, run_of("bf16"), 2)
    assert several[0]["losses"] == losses(single)
    assert single[0]["losses"] == pytest.approx(bf16[0]["losses"], rel=1e-2)
    assert single[0]["losses"] != bf16[0]["losses"], "the products have 8 bits"


def test_a_size_that_the_products_cannot_have_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="multiples of 16 on each tensor rank, and model.ffn_hidden is 72 on 2 ranks"):
        tiny_config(model={**MODEL, "ffn_hidden": 72}, training={"precision": "fp8"}, parallel={"tensor": 2})


def test_a_gpu_without_8_bit_products_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(products.torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r'"fp8" needs .* 9.0 \(Hopper\) or newer, not NVIDIA A100; use "bf16"'):
        require_fp8(torch.device("cuda"))
    require_fp8(torch.device("cpu"))
