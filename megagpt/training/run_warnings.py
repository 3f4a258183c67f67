"""Settings of a run that have no effect or are probably a mistake: one sentence each, for the start of a run."""

from collections.abc import Iterator

import numpy as np

from megagpt.config.schema import Config
from megagpt.data.blend import Blend, Dataset, Datasets
from megagpt.data.examples import PackedExamples
from megagpt.data.gpt_dataset import PackedCorpus
from megagpt.data.indexed import IndexedCorpus
from megagpt.data.span_corruption import required_vocab_size
from megagpt.data.tokenizer import Tokenizer

MAX_EPOCHS = 4
"""Up to this number of epochs repeated text is almost as good as new text (Muennighoff et al., arXiv 2305.16264)."""
MAX_MASKED = 0.5
"""Share of masked labels that is probably a mistake."""
CHECKED_DOCUMENTS = 1000
CHECKED_SAMPLES = 8


def config_warnings(config: Config, total_steps: int, has_valid: bool) -> list[str]:
    """Return a sentence for each setting that can never take effect in a run of `total_steps`."""
    return [*_never_reached(config, total_steps, has_valid), *_learning_rate(config, total_steps), *_unused(config)]


def tokenizer_warnings(config: Config, datasets: Datasets, tokenizer: Tokenizer) -> list[str]:
    """Return a sentence for each sign that model or data belong to another tokenizer. Reads up to 1000 documents' ends."""
    warnings = []
    size, used = config.model.tokens_in_vocab, required_vocab_size(config.data, tokenizer)
    if size != used:
        warnings.append(
            f"model.vocab_size is {size}, but the tokenizer has {tokenizer.vocab_size} tokens: the other "
            f"{size - used} entries are never used"
        )
    for packed in corpora_of(datasets.train):
        if isinstance(packed, PackedCorpus) and not _has_document_end(packed.corpus, tokenizer.eod_id):
            warnings.append(
                f"{packed.corpus.prefix}: no document ends with the tokenizer's end-of-document token {tokenizer.eod_id}; it "
                "was made with another tokenizer, or without --append-eod"
            )
    return warnings


def data_warnings(config: Config, dataset: Dataset, n_samples: int) -> list[str]:
    """Return a sentence for each corpus that is read often, and for masked labels in the first samples."""
    warnings = [
        f"{packed.corpus.prefix}: is read {epochs:.1f} times; above about {MAX_EPOCHS} epochs repeated text adds little "
        "(arXiv 2305.16264)"
        for packed, epochs in epochs_of_each(dataset, n_samples)
        if epochs > MAX_EPOCHS
    ]
    if config.data.mask_document_ends:
        starts = np.concatenate([dataset.sample(index).starts[1:] for index in range(CHECKED_SAMPLES)])
        if starts.mean() > MAX_MASKED:
            warnings.append(
                f"data.mask_document_ends: {starts.mean():.0%} of the labels of the first {CHECKED_SAMPLES} samples are "
                "masked, because the documents are so short"
            )
    return warnings


def corpora_of(dataset: Dataset) -> list[PackedCorpus | PackedExamples]:
    """Return the corpora of a dataset."""
    members = dataset.corpora if isinstance(dataset, Blend) else [dataset]
    return [member for member in members if isinstance(member, PackedCorpus | PackedExamples)]


def epochs_of_each(dataset: Dataset, n_samples: int) -> list[tuple[PackedCorpus | PackedExamples, float]]:
    """Return each corpus with the number of times that the first `n_samples` samples read it."""
    counts = dataset.samples_of_each(n_samples) if isinstance(dataset, Blend) else [n_samples]
    corpora = corpora_of(dataset)
    return [(corpus, count / corpus.samples_per_epoch) for corpus, count in zip(corpora, counts, strict=False)]


def _never_reached(config: Config, total_steps: int, has_valid: bool) -> Iterator[str]:
    if config.checkpoint.dir is None:
        yield "nothing will be saved: checkpoint.dir is not set"
        if config.checkpoint.interval is not None:
            yield f"checkpoint.interval: {config.checkpoint.interval} has no effect without checkpoint.dir"
    if config.evaluation.interval is not None and not has_valid:
        yield (
            f"evaluation.interval: {config.evaluation.interval} has no effect, because there is no validation data; set "
            "data.valid, or a share of data.split"
        )
    intervals = {
        "evaluation.interval": config.evaluation.interval if has_valid else None,
        "checkpoint.interval": config.checkpoint.interval if config.checkpoint.dir is not None else None,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "logging.noise_scale_interval": config.logging.noise_scale_interval,
        "resilience.replica_check_interval": config.resilience.replica_check_interval,
        "resilience.spike_window": config.resilience.spike_window if config.resilience.on_spike != "none" else None,
    }
    for key, interval in intervals.items():
        if interval is not None and interval > total_steps:
            yield f"{key}: {interval} is never reached in a run of {total_steps} steps"


def _learning_rate(config: Config, total_steps: int) -> Iterator[str]:
    schedule = config.lr_schedule
    warmup, decay = schedule.warmup_steps, schedule.decay_steps
    if warmup > total_steps:
        yield (
            f"lr_schedule.warmup_steps: {warmup} is longer than the run of {total_steps} steps, so the learning rate never "
            "reaches its peak"
        )
    if decay is None:
        return
    if schedule.type in ("cosine", "linear"):
        if decay < total_steps and schedule.min_lr == 0:
            yield (
                f"lr_schedule.decay_steps: after step {decay} the learning rate is 0, so the last {total_steps - decay} of "
                f"{total_steps} steps learn nothing; set lr_schedule.min_lr, or a longer decay"
            )
        elif decay > total_steps:
            yield f"lr_schedule.decay_steps: {decay} is above the {total_steps} steps of the run, so min_lr is never reached"
    elif schedule.type == "warmup-stable-decay" and decay + warmup > total_steps:
        yield (
            f"lr_schedule.decay_steps: {decay} and lr_schedule.warmup_steps {warmup} are longer than the run of {total_steps} "
            "steps, so the decay is shorter and there is no stable phase"
        )


def _unused(config: Config) -> Iterator[str]:
    """Yield settings that another setting makes useless."""
    schedule, optimizer, evaluation = config.lr_schedule, config.optimizer, config.evaluation
    if schedule.decay_steps is not None and schedule.type in ("constant", "inverse-sqrt"):
        yield f"lr_schedule.decay_steps: {schedule.decay_steps} has no effect with lr_schedule.type {schedule.type}"
    if optimizer.momentum and optimizer.type not in ("sgd", "muon"):
        yield f"optimizer.momentum: {optimizer.momentum:g} has no effect with optimizer.type {optimizer.type}"
    if config.model.clf_pdrop:
        yield f"model.clf_pdrop: {config.model.clf_pdrop:g} has no effect, because the model has no classification head"
    if config.training.recompute_layers > 1 and config.training.recompute != "full":
        yield f"training.recompute_layers: {config.training.recompute_layers} has no effect without training.recompute full"
    if evaluation.micro_batch_size is not None and config.data.split is None and not (config.data.valid or config.data.test):
        yield f"evaluation.micro_batch_size: {evaluation.micro_batch_size} has no effect without validation and test data"
    if config.logging.wandb.name is not None and config.logging.wandb.project is None:
        yield "logging.wandb.name: has no effect without logging.wandb.project"


def _has_document_end(corpus: IndexedCorpus, eod_id: int) -> bool:
    """Return whether one of up to `CHECKED_DOCUMENTS` documents, spread over the corpus, ends with the token."""
    n_documents = len(corpus.document_indices) - 1
    for document in np.unique(np.linspace(0, n_documents - 1, min(n_documents, CHECKED_DOCUMENTS)).astype(np.int64)):
        sequence = int(corpus.document_indices[document + 1]) - 1
        size = int(corpus.sizes[sequence]) if sequence >= 0 else 0
        if size and int(corpus.read(sequence, size - 1, 1)[0]) == eod_id:
            return True
    return False
