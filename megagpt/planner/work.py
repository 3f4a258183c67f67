"""What a part of the model does on one rank: floating-point operations, bytes of device memory, kernels and collectives.

Times follow from it in `timing.py`. The records add up, so a stage is the sum of its layers.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple


class Call(NamedTuple):
    """Collectives of one kind over one axis."""

    axis: str
    """"tensor", "context", "dp_cp", "pipeline" or "embedding", as in docs/communication.md."""
    kind: str
    """"all-reduce", "reduce-scatter", "all-gather", "reduce", "all-to-all" or "send"."""
    bytes: float
    """Bytes of the full tensor of one call."""
    times: float = 1


@dataclass(frozen=True)
class Work:
    """One pass over a part of the model."""

    flops: float = 0
    """Of matrix products in the type of the weights."""
    narrow_flops: float = 0
    """Of matrix products whose factors have 8 bits."""
    core_flops: float = 0
    """Of attention scores and weighted values."""
    loaded: float = 0
    """Bytes that matrix products and attention read and write, most of them while they compute."""
    moved: float = 0
    """Bytes that other kernels read and write."""
    kernels: float = 0
    """Kernels that are launched."""
    calls: tuple[Call, ...] = ()
    """Collectives that the computation waits for."""
    overlaps: tuple["Overlap", ...] = ()
    """Collectives that run while other work of this pass is computed."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.narrow_flops + other.narrow_flops,
            self.core_flops + other.core_flops,
            self.loaded + other.loaded,
            self.moved + other.moved,
            self.kernels + other.kernels,
            self.calls + other.calls,
            self.overlaps + other.overlaps,
        )

    @property
    def product_flops(self) -> float:
        """FLOPs of all matrix products."""
        return self.flops + self.narrow_flops

    def without_overlap(self) -> "Work":
        """Return the same work, with collectives that all wait."""
        calls = self.calls + tuple(overlap.call for overlap in self.overlaps)
        return replace(self, calls=calls, overlaps=())

    def traffic(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Return calls and bytes of all collectives, by axis and kind."""
        result: dict[tuple[str, str], tuple[float, float]] = {}
        for call in self.without_overlap().calls:
            times, size = result.get((call.axis, call.kind), (0.0, 0.0))
            result[call.axis, call.kind] = (times + call.times, size + call.times * call.bytes)
        return {key: value for key, value in result.items() if value[0]}


class Overlap(NamedTuple):
    """A collective, and the work of the same pass that is computed while it runs."""

    call: Call
    cover: Work


def product(tokens: float, n_in: float, n_out: float, itemsize: int, narrow: bool = False) -> Work:
    """Return the product [tokens, n_in] x [n_in, n_out]: each tensor is read or written once.

    `narrow`: both factors are rounded to 8 bits first: read once for the scales, once for the values, and written.
    """
    if narrow:
        factors = tokens * n_in + n_in * n_out
        loaded = factors + itemsize * tokens * n_out
        return Work(narrow_flops=2 * tokens * n_in * n_out, loaded=loaded, moved=(2 * itemsize + 1) * factors, kernels=3)
    loaded = itemsize * (tokens * (n_in + n_out) + n_in * n_out)
    return Work(flops=2 * tokens * n_in * n_out, loaded=loaded, kernels=1)


def weight_gradient(tokens: float, n_in: float, n_out: float, itemsize: int) -> Work:
    """Return the product for a weight gradient, which is added to fp32 sums in memory."""
    loaded = itemsize * tokens * (n_in + n_out) + 8 * n_in * n_out
    return Work(flops=2 * tokens * n_in * n_out, loaded=loaded, kernels=1)


def elementwise(n_bytes: float, kernels: float = 1) -> Work:
    """Return memory-bound work that moves `n_bytes`."""
    return Work(moved=n_bytes, kernels=kernels)
