"""Keys and values of one decoder layer of a model with an encoder, for generation: of its earlier tokens, and of the source.

All rows have the same number of tokens, as in beam search, so there are no pages.
"""

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Keys and values, each [rows, heads, keys, head size]."""


class MemoryCache:
    """Grows by the tokens of each forward; the source's keys and values are stored once."""

    def __init__(self) -> None:
        self.source: Pair | None = None
        """Keys and values of the encoder's output; None before the first forward."""
        self._tokens: Pair | None = None

    def append(self, keys: Tensor, values: Tensor) -> Pair:
        """Store the keys and values of new tokens; return those of all tokens."""
        if self._tokens is None:
            self._tokens = keys, values
        else:
            before_keys, before_values = self._tokens
            self._tokens = torch.cat((before_keys, keys), 2), torch.cat((before_values, values), 2)
        return self._tokens

    def select(self, rows: Tensor, sources_too: bool) -> None:
        """Continue with other rows: `rows` are indices of the present ones. `sources_too`: whether their sources differ."""
        if self._tokens is not None:
            self._tokens = _rows_of(self._tokens, rows)
        if sources_too and self.source is not None:
            self.source = _rows_of(self.source, rows)


def _rows_of(pair: Pair, rows: Tensor) -> Pair:
    return pair[0].index_select(0, rows), pair[1].index_select(0, rows)
