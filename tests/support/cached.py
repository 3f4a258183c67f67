"""Logits by way of the cache, for tests that compare them with those of the full text."""

from collections.abc import Sequence

import torch

from megagpt.model.gpt import GPTChunk
from megagpt.model.kv_cache import LayerCache, PagePool, pages_for, place_rows


def cached_logits(model: GPTChunk, tokens: torch.Tensor, pieces: Sequence[int]) -> torch.Tensor:
    """Return the logits after each piece, [batch, pieces, vocabulary]; `tokens` [batch, seq] are given in these pieces."""
    batch, length = tokens.shape
    pool = PagePool(batch * pages_for(length))
    tables = [pool.take(pages_for(length)) for _ in range(batch)]
    caches = {int(index): LayerCache(pool.n_pages) for index in model.layers}
    logits, done = [], 0
    for size in pieces:
        rows = place_rows(tables, [done + size] * batch, [size] * batch)
        logits.append(model.next_token_logits(tokens[:, done : done + size], rows, caches))
        done += size
    return torch.stack(logits, 1)
