"""Jobs run at once, or when they are called after a `deferring` block; sums go to `.grad` in place and in its dtype."""

import pytest
import torch
from support.products import MatrixProducts
from torch import nn

from megagpt.parallel.deferred_gradients import DeferredGradients, accumulate, accumulate_product, gradient_dtype


def test_a_job_runs_at_once_outside_of_a_deferring_block() -> None:
    deferred, done = DeferredGradients(), []
    deferred.add(lambda: done.append(1))
    assert done == [1]


def test_a_deferring_block_collects_its_jobs_in_order_and_runs_none() -> None:
    deferred, done = DeferredGradients(), []
    with deferred.deferring() as jobs:
        for number in range(3):
            deferred.add(lambda number=number: done.append(number))
        assert done == [] and len(jobs) == 3
    assert done == []
    deferred.add(lambda: done.append("at once"))
    for job in jobs:
        job()
    assert done == ["at once", 0, 1, 2]


def test_each_block_has_its_own_jobs() -> None:
    deferred = DeferredGradients()
    with deferred.deferring() as first:
        deferred.add(lambda: None)
    with deferred.deferring() as second:
        pass
    assert (len(first), len(second)) == (1, 0)


def test_jobs_run_at_once_again_after_an_error_in_a_block() -> None:
    deferred, done = DeferredGradients(), []
    with pytest.raises(RuntimeError), deferred.deferring():
        raise RuntimeError
    deferred.add(lambda: done.append(1))
    assert done == [1]


def parameter(dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None) -> nn.Parameter:
    weight = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
    if grad_dtype is not None:
        weight.grad_dtype = grad_dtype
    return weight


@pytest.mark.parametrize(
    "dtype, grad_dtype, expected",
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
    ],
)
def test_gradients_add_up_in_place_in_the_parameter_s_gradient_dtype(
    dtype: torch.dtype, grad_dtype: torch.dtype | None, expected: torch.dtype
) -> None:
    weight = parameter(dtype, grad_dtype)
    assert gradient_dtype(weight) == expected
    accumulate(weight, torch.full((2, 3), 1.0, dtype=dtype))
    assert weight.grad is not None and weight.grad.dtype == expected
    storage = weight.grad.data_ptr()
    accumulate(weight, torch.full((2, 3), 2.0, dtype=dtype))
    assert torch.equal(weight.grad, torch.full((2, 3), 3.0, dtype=expected))
    assert weight.grad.data_ptr() == storage
    accumulate(weight, torch.full((2, 3), 2.0**-9, dtype=torch.float32))
    assert weight.grad[0, 0] == (3 + 2.0**-9 if expected == torch.float32 else 3)


@pytest.mark.parametrize("grad_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added_like_any_gradient(dtype: torch.dtype, grad_dtype: torch.dtype | None) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-4, 5, shape, generator=generator).to(dtype) for shape in ((2, 5), (5, 3)))  # exact sums
    product, by_product = parameter(dtype, grad_dtype), parameter(dtype, grad_dtype)
    for _ in range(2):
        accumulate(product, left @ right)
        accumulate_product(by_product, left, right)
    assert product.grad is not None and by_product.grad is not None
    assert by_product.grad.dtype == product.grad.dtype
    assert torch.equal(by_product.grad, product.grad)


def test_a_product_is_computed_once_and_without_a_temporary_tensor_if_the_dtypes_allow_it() -> None:
    weight = parameter()
    left, right = torch.ones(2, 5), torch.ones(5, 3)
    accumulate_product(weight, left, right)
    assert weight.grad is not None
    storage = weight.grad.data_ptr()
    with MatrixProducts() as products:
        accumulate_product(weight, left, right)
    assert products.names == ["addmm_"]
    assert weight.grad.data_ptr() == storage and torch.equal(weight.grad, torch.full((2, 3), 10.0))
