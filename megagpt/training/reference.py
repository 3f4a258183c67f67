"""Log-probabilities of the reference model for preference tuning: computed once, and stored beside the data.

PREFIX.reference.npz has log p(chosen) - log p(rejected) of each pair, and says of which weights it is.
"""

import hashlib
import os
import secrets
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.checkpoint.format import MANIFEST
from megagpt.config.schema import Config
from megagpt.data.blend import Blend, Dataset
from megagpt.data.examples import PackedExamples, mask_prefix
from megagpt.data.gpt_dataset import Sample
from megagpt.data.index_cache import content_fingerprint
from megagpt.data.indexed import IndexedCorpus
from megagpt.data.sampler import GlobalBatches
from megagpt.distributed.object_collectives import all_gather_object, broadcast_object, run_on_ranks
from megagpt.distributed.rank_zero import rank_zero_note
from megagpt.engine.engine import Engine
from megagpt.errors import DataError, TrainingError
from megagpt.model.objectives import PreferenceLoss
from megagpt.training.micro_batches import to_host_batch

Margins = npt.NDArray[np.float32]
"""log p(chosen) - log p(rejected) of each pair of a corpus; NaN for a pair that was not computed."""


def reference_path(prefix: str) -> Path:
    """Return the file with the margins of a pair of token files."""
    return Path(f"{prefix}.reference.npz")


def examples_of(datasets: Iterable[Dataset]) -> list[PackedExamples]:
    """Return the corpora of all datasets."""
    members = [dataset.corpora if isinstance(dataset, Blend) else [dataset] for dataset in datasets]
    return [member for group in members for member in group if isinstance(member, PackedExamples)]


def reference_fingerprint(checkpoint: Path, precision: str) -> str:
    """Return a hash of the weights of a checkpoint, through the checksums in its manifest, and of how they are used."""
    manifest = (checkpoint / MANIFEST).read_bytes()
    return f"{hashlib.sha256(manifest).hexdigest()} {precision}"


def stored_margins(corpora: Sequence[PackedExamples], fingerprint: str) -> bool:
    """Give each corpus its stored margins; return False if some are missing or of other weights. Collective."""
    loaded = broadcast_object(run_on_ranks(lambda: [_read(corpus, fingerprint) for corpus in corpora], only_rank=0))
    if any(margins is None for margins in loaded):
        return False
    for corpus, margins in zip(corpora, loaded, strict=True):
        corpus.references = margins
    return True


def compute_margins(engine: Engine, config: Config, corpora: Sequence[PackedExamples], fingerprint: str) -> None:
    """Compute the margins of the engine's present weights, give them to the corpora and store them. Collective.

    Raises DataError if a file cannot be written.
    """
    by_prefix: dict[str, Margins] = {}
    for corpus in corpora:  # several of them share a prefix if a split divides it
        prefix = corpus.corpus.prefix
        rank_zero_note(f"{prefix}: computing the log-probabilities of the reference model")
        margins = by_prefix.setdefault(prefix, np.full(corpus.n_examples, np.nan, np.float32))
        margins[corpus.used_examples] = _compute(engine, config, corpus)[corpus.used_examples]
        corpus.references = margins
    for corpus in {corpus.corpus.prefix: corpus for corpus in corpora}.values():
        run_on_ranks(partial(_write, corpus, fingerprint), only_rank=0)


class _WithoutReferences:
    """The samples of one epoch with references of 0, as they are not known yet. Further samples repeat the last one."""

    def __init__(self, corpus: PackedExamples) -> None:
        self._corpus = corpus
        self.samples_per_epoch = self.unrepeated_samples = corpus.samples_per_epoch

    def sample(self, index: int) -> Sample:
        """Return sample `index` >= 0."""
        index = min(index, self.samples_per_epoch - 1)
        n_pairs = len(self._corpus.examples_of(index))
        return self._corpus.sample(index)._replace(references=np.zeros(n_pairs, np.float32))


def _compute(engine: Engine, config: Config, corpus: PackedExamples) -> Margins:
    topology = engine.topology
    micro_batch_size = config.evaluation.micro_batch_size or config.training.micro_batch_size
    size = micro_batch_size * topology.layout.data
    batches = GlobalBatches(
        _WithoutReferences(corpus), size, micro_batch_size, topology.dp_rank, topology.layout.data, config.model.tokens_in_vocab
    )
    found: dict[int, float] = {}
    for first in range(0, corpus.samples_per_epoch, size):
        engine.phase.enter(f"reference of sample {first}")
        host_batch = to_host_batch(batches.micro_batches(first, size), config, topology, first, size)
        with _objective(engine).recording() as recorded:
            engine.evaluate(host_batch.to(engine.device))
        rows = [row for margins in recorded for row in margins.tolist()]  # none except on the last stage
        for sample, row in zip(host_batch.samples.tolist(), rows, strict=False):
            if sample < corpus.samples_per_epoch:
                found |= dict(zip(corpus.examples_of(sample).tolist(), row, strict=False))
    margins = np.full(corpus.n_examples, np.nan, np.float32)
    for part in all_gather_object(found):
        margins[list(part)] = list(part.values())
    if not np.isfinite(margins[corpus.used_examples]).all():
        raise TrainingError(f"{corpus.corpus.prefix}: the reference model gives a log-probability that is not finite")
    return margins


def _objective(engine: Engine) -> PreferenceLoss:
    """Return the objective of the last chunk; on ranks without it one that is never called."""
    last = next((chunk for chunk in engine.chunks.values() if chunk.is_last), None)
    objective = PreferenceLoss(engine.config) if last is None else last.objective
    assert isinstance(objective, PreferenceLoss)
    return objective


def _identity(corpus: PackedExamples) -> str:
    """Return a hash of the tokens and the mask."""
    prefix = corpus.corpus.prefix
    return f"{content_fingerprint(corpus.corpus)} {content_fingerprint(IndexedCorpus(mask_prefix(prefix)))}"


def _read(corpus: PackedExamples, fingerprint: str) -> Margins | None:
    """Return the stored margins, or None if there are none of these weights for all pairs that are used."""
    try:
        with np.load(reference_path(corpus.corpus.prefix), allow_pickle=False) as file:
            names, margins = [str(file["weights"]), str(file["data"])], file["margins"].astype(np.float32)
    except (OSError, ValueError, KeyError, EOFError):
        return None
    if names != [fingerprint, _identity(corpus)] or len(margins) != corpus.n_examples:
        return None
    return margins if np.isfinite(margins[corpus.used_examples]).all() else None


def _write(corpus: PackedExamples, fingerprint: str) -> None:
    """Write the corpus's margins under a temporary name, and rename the file."""
    path = reference_path(corpus.corpus.prefix)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, margins=np.asarray(corpus.references), weights=fingerprint, data=_identity(corpus))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}; the data's folder must be writable once") from None
    finally:
        temporary.unlink(missing_ok=True)
