"""How a parameter of megagpt and tensors of a Hugging Face model contain each other. Every rule is exact in both directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Rule(Protocol):
    """The tensors of a Hugging Face model that one parameter consists of."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of these tensors, without the prefix of their layer."""

    def to_megagpt(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the parameter made of the tensors `names`."""

    def from_megagpt(self, parameter: Tensor) -> list[Tensor]:
        """Return the tensors `names`."""


@dataclass(frozen=True)
class Same:
    """The same values under another name."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """The one name."""
        return (self.name,)

    def to_megagpt(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the tensor."""
        return tensors[0]

    def from_megagpt(self, parameter: Tensor) -> list[Tensor]:
        """Return the parameter."""
        return [parameter]


@dataclass(frozen=True)
class Transposed:
    """A weight of GPT-2's Conv1D, [in, out]; vectors stay."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """The one name."""
        return (self.name,)

    def to_megagpt(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the transposed matrix."""
        return tensors[0].t()

    def from_megagpt(self, parameter: Tensor) -> list[Tensor]:
        """Return the transposed matrix."""
        return [parameter.t()]


@dataclass(frozen=True)
class Stacked:
    """Tensors of one shape as parts of one parameter, [parts, ...]: gate and up, or keys and values."""

    names: tuple[str, ...]

    def to_megagpt(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the tensors as one, with a new first dim."""
        return torch.stack(tuple(tensors))

    def from_megagpt(self, parameter: Tensor) -> list[Tensor]:
        """Return the parts."""
        return list(parameter.unbind(0))


@dataclass(frozen=True)
class ByHead:
    """Queries, keys and values as three tensors; megagpt orders the rows by head: query, key and value of each."""

    names: tuple[str, ...]
    heads: int

    def to_megagpt(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the rows of all tensors ordered by head."""
        by_head = [tensor.unflatten(0, (self.heads, -1)) for tensor in tensors]
        return torch.stack(by_head, 1).flatten(0, 2)

    def from_megagpt(self, parameter: Tensor) -> list[Tensor]:
        """Return the rows of each of the tensors."""
        return [part.flatten(0, 1) for part in parameter.unflatten(0, (self.heads, len(self.names), -1)).unbind(1)]


@dataclass(frozen=True)
class Conv1DByHead:
    """GPT-2's c_attn: queries, keys and values of all heads, one after the other, as columns of a Conv1D."""

    name: str
    heads: int

    @property
    def names(self) -> tuple[str, ...]:
        """The one name."""
        return (self.name,)

    def to_megagpt(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the rows ordered by head."""
        rows = tensors[0].t() if tensors[0].dim() == 2 else tensors[0]
        return rows.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)

    def from_megagpt(self, parameter: Tensor) -> list[Tensor]:
        """Return the columns ordered by kind."""
        rows = parameter.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        return [rows.t() if rows.dim() == 2 else rows]


@dataclass(frozen=True)
class ByBucket:
    """T5's table of relative biases, [buckets, heads], which megagpt stores flat, ordered by head."""

    name: str
    heads: int

    @property
    def names(self) -> tuple[str, ...]:
        """The one name."""
        return (self.name,)

    def to_megagpt(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the biases of one head after the other."""
        return tensors[0].t().flatten()

    def from_megagpt(self, parameter: Tensor) -> list[Tensor]:
        """Return the table."""
        return [parameter.unflatten(0, (self.heads, -1)).t()]
