"""Count matrix products, whoever computes them."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class MatrixProducts(TorchDispatchMode):
    """Inside a `with` block, records the shape (m, k, n) of every product [m, k] x [k, n], in forwards and backwards.

    The batched products of attention are not included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []
        self.names: list[str] = []
        """Operator of each product: "mm", "addmm" or "addmm_"."""

    @property
    def flops(self) -> int:
        """Multiplications and additions of all products."""
        return sum(2 * m * k * n for m, k, n in self.shapes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.names.append(name)
            self.shapes.append((*left.shape, right.shape[1]))
        return func(*args, **(kwargs or {}))
