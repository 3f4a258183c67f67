"""What a run's samples are drawn from: which corpora, in which order. Saved in checkpoints and compared between ranks."""

import numpy as np
from pydantic import BaseModel, ConfigDict

from megagpt.config.schema import DataConfig, Source
from megagpt.data.encoder_samples import EncoderFormat
from megagpt.data.examples import mask_prefix
from megagpt.data.index_cache import content_fingerprint
from megagpt.data.indexed import IndexedCorpus


class CorpusIdentity(BaseModel):
    """One corpus. Where it lies is not part of it: `prefix` is for messages only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefix: str
    weight: float
    sequences: int
    tokens: int
    fingerprint: str
    """Hash of the sequence sizes and of 64 blocks of the tokens; with a mask, also that of the mask."""

    @property
    def content(self) -> tuple[int, int, str]:
        """Equal for copies of a corpus."""
        return self.sequences, self.tokens, self.fingerprint

    def __str__(self) -> str:
        return f"{self.prefix} ({self.sequences:,} sequences, {self.tokens:,} tokens)"


class DataIdentity(BaseModel):
    """The data of a run. The same identity gives the same sample at each position of the stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = "text"
    long_examples: str = "drop"
    seed: int
    split: str | None
    sequence_length: int
    source_length: int | None = None
    """That of the encoder, if there is one."""
    parts: dict[str, list[CorpusIdentity]]
    """"train", "valid", "valid.NAME", "test" or "paths" -> its corpora."""


def data_identity(data: DataConfig, sequence_length: int, encoder: EncoderFormat | None = None) -> DataIdentity:
    """Return the identity of the data that a config names. Raises DataError if files are missing or damaged."""
    parts = {part: _corpora(source, data.has_examples) for part, source in data.sources.items()}
    return DataIdentity(
        task=data.task,
        long_examples=data.long_examples,
        seed=data.seed,
        split=data.split,
        sequence_length=sequence_length,
        source_length=None if encoder is None else encoder.positions,
        parts=parts,
    )


def training_data_changes(saved: DataIdentity, current: DataIdentity) -> list[str]:
    """Return one clause for each reason why positions in the stream of training samples mean something else now."""
    changes = []
    for part in ("train", "paths"):
        before, after = saved.parts.get(part, []), current.parts.get(part, [])
        if [(corpus.content, corpus.weight) for corpus in before] != [(corpus.content, corpus.weight) for corpus in after]:
            changes.append(f"data.{part} was {_listed(before)} and is {_listed(after)}")
    for key, name in (
        ("task", "data.task"),
        ("long_examples", "data.long_examples"),
        ("seed", "data.seed"),
        ("split", "data.split"),
        ("sequence_length", "model.n_positions"),
        ("source_length", "model.encoder_positions"),
    ):
        if getattr(saved, key) != getattr(current, key):
            changes.append(f"{name} was {getattr(saved, key)} and is {getattr(current, key)}")
    return changes


def _corpora(source: Source, has_mask: bool) -> list[CorpusIdentity]:
    weights = {source: 1.0} if isinstance(source, str) else source
    return [_corpus(prefix, weight, has_mask) for prefix, weight in weights.items()]


def _corpus(prefix: str, weight: float, has_mask: bool) -> CorpusIdentity:
    corpus = IndexedCorpus(prefix)
    tokens = int(np.sum(corpus.sizes, dtype=np.int64))
    fingerprint = content_fingerprint(corpus)
    if has_mask:
        fingerprint += f" {content_fingerprint(IndexedCorpus(mask_prefix(prefix)))}"
    return CorpusIdentity(prefix=prefix, weight=weight, sequences=len(corpus.sizes), tokens=tokens, fingerprint=fingerprint)


def _listed(corpora: list[CorpusIdentity]) -> str:
    weighted = len(corpora) > 1
    return ", ".join(f"{corpus} x {corpus.weight:g}" if weighted else str(corpus) for corpus in corpora) or "not set"
