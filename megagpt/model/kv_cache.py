"""Keys and values of earlier tokens, for generation, in pages of a fixed number of tokens.

Every sequence has a page table: the numbers of its pages, in order, the same in all layers. So sequences of any lengths share
one memory, and a sequence that ends gives its pages back (Kwon et al., arXiv 2309.06180).

The rows of a batch are aligned at their ends: the last key of each row is its newest token. Query and key are then equally
far apart in all rows, so masks and biases of distances are those of a batch with equal lengths; shorter rows begin with
padding, which is hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_TOKENS = 16
"""Tokens of a page."""


class PagePool:
    """The pages that no sequence has. Page 0 is not among them: its zeros stand for padding."""

    def __init__(self, n_pages: int) -> None:
        """`n_pages`: pages for sequences."""
        self.n_pages = n_pages
        self._free = list(range(n_pages, 0, -1))

    @property
    def n_free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def take(self, number: int) -> list[int]:
        """Return the numbers of pages that were free. Raises ValueError if there are fewer than `number`."""
        if number > len(self._free):
            raise ValueError(f"{number} pages wanted, {len(self._free)} are free")
        return [self._free.pop() for _ in range(number)]

    def give_back(self, pages: Sequence[int]) -> None:
        """Make pages free again."""
        self._free.extend(pages)


def pages_for(n_tokens: int) -> int:
    """Return the number of pages that `n_tokens` need."""
    return -(-n_tokens // PAGE_TOKENS)


@dataclass(frozen=True)
class CachedRows:
    """Where the tokens of one forward are: some new tokens of each row, and all tokens that they can attend to."""

    positions: Tensor
    """Position of each new token in its sequence, [rows, new]; 0 for padding."""
    lengths: Tensor
    """Tokens of each row, the new ones included, [rows]."""
    slots: Tensor
    """Place of each token in the memory of a layer, [rows, keys], aligned at the end; 0 for padding."""
    written: Tensor | None
    """Indices of the new tokens that are no padding, into [rows x new]; None for all."""
    have_equal_lengths: bool
    start_at_zero: bool
    """All tokens of all rows are new."""

    @property
    def n_new(self) -> int:
        """New tokens of the row that has most."""
        return self.positions.shape[1]

    @property
    def n_keys(self) -> int:
        """Tokens of the longest row."""
        return self.slots.shape[1]

    def n_visible(self, window: int | None) -> int:
        """Return how many of the last keys the new tokens can attend to."""
        return self.n_keys if window is None else min(self.n_keys, window + self.n_new - 1)


def place_rows(
    tables: Sequence[Sequence[int]], lengths: Sequence[int], new: Sequence[int], device: torch.device | str = "cpu"
) -> CachedRows:
    """Place the tokens of a forward in the pages of their sequences.

    `tables`: the pages of each row; `lengths`: tokens of each row, the new ones included; `new`: new tokens of each row.
    """
    n_keys, n_new = max(lengths), max(new)
    n_pages = pages_for(n_keys)
    pages = torch.tensor([[*table[:n_pages], *[0] * (n_pages - len(table))] for table in tables])  # [rows, pages]
    row_lengths = torch.tensor(lengths)
    positions = torch.arange(n_keys) - (n_keys - row_lengths.unsqueeze(1))  # [rows, keys]; negative for padding
    real = positions.clamp(min=0)
    slots = pages.gather(1, real // PAGE_TOKENS) * PAGE_TOKENS + real % PAGE_TOKENS
    slots = slots.masked_fill(positions < 0, 0)
    written = None
    if min(new) < n_new:
        is_new = torch.arange(n_new) >= n_new - torch.tensor(new).unsqueeze(1)
        written = is_new.flatten().nonzero().squeeze(1).to(device)
    return CachedRows(
        positions=real[:, n_keys - n_new :].to(device),
        lengths=row_lengths.to(device),
        slots=slots.to(device),
        written=written,
        have_equal_lengths=min(lengths) == n_keys,
        start_at_zero=list(lengths) == list(new),
    )


def cached_mask(rows: CachedRows, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """Return 0 or -inf, [rows or 1, 1, new, visible keys]: which keys each new token attends to.

    Returns None if there is nothing to hide, except later tokens of a prompt that has no earlier ones.
    """
    n_new, n_visible = rows.n_new, rows.n_visible(window)
    fills_window = window is None or n_visible <= window
    if rows.have_equal_lengths and fills_window and (n_new == 1 or rows.start_at_zero):
        return None
    keys = torch.arange(n_visible, device=rows.slots.device)
    queries = torch.arange(n_visible - n_new, n_visible, device=rows.slots.device).unsqueeze(1)
    visible = keys <= queries  # [new, visible keys]
    if window is not None:
        visible = visible & (keys > queries - window)
    visible = visible.unsqueeze(0)
    if not rows.have_equal_lengths:
        first = (n_visible - rows.lengths).view(-1, 1, 1)
        visible = (visible & (keys >= first)) | (keys == queries)  # padding sees itself: a row of -inf would give NaN
    visible = visible.unsqueeze(1)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


class LayerCache:
    """Keys and values of one layer, each [slots, heads, head size]; the memory is allocated with the first tokens."""

    def __init__(self, n_pages: int) -> None:
        """`n_pages`: pages for sequences."""
        self._n_slots = (n_pages + 1) * PAGE_TOKENS
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor, rows: CachedRows, window: int | None) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens, [rows, heads, new, head size].

        Returns those of all tokens that the new ones can attend to, [rows, heads, visible keys, head size].
        """
        if self._keys is None or self._values is None:
            shape = (self._n_slots, keys.shape[1], keys.shape[3])
            self._keys, self._values = keys.new_zeros(shape), values.new_zeros(shape)
        slots = rows.slots[:, rows.n_keys - rows.n_new :].flatten()
        if rows.written is not None:
            slots = slots[rows.written]
        for memory, new in ((self._keys, keys), (self._values, values)):
            tokens = new.transpose(1, 2).flatten(0, 1)  # [rows x new, heads, head size]
            memory[slots] = tokens if rows.written is None else tokens[rows.written]
        if rows.start_at_zero:
            return keys, values
        visible = rows.slots[:, rows.n_keys - rows.n_visible(window) :]
        return _gathered(self._keys, visible), _gathered(self._values, visible)


def _gathered(memory: Tensor, slots: Tensor) -> Tensor:
    """Return the tokens in `slots`, [rows, keys], as [rows, heads, keys, head size]."""
    return memory.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2)
