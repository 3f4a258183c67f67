"""Scores of written texts against references: ROUGE (Lin 2004), BLEU (Papineni et al. 2002) and chrF (Popovic 2015)."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megagpt.data.offline.documents import InputFile
from megagpt.errors import ConfigError, DataError

ROUGE = ("rouge1", "rouge2", "rougeL")


class Pair(NamedTuple):
    """A source and the target that is expected for it."""

    source: str
    target: str


def read_pairs(path: Path, limit: int | None = None) -> list[Pair]:
    """Read JSON lines or Parquet with "source" and "target". Raises DataError if a record has none, or if there is none."""
    pairs: list[Pair] = []
    for place, record in InputFile(path, []).records():
        if len(pairs) == limit:
            break
        source, target = record.get("source"), record.get("target")
        if not isinstance(source, str) or not isinstance(target, str):
            raise DataError(f'{place}: expected texts under "source" and "target"; found {", ".join(map(repr, record))}')
        pairs.append(Pair(source, target))
    if not pairs:
        raise DataError(f'{path}: has no pair; expected JSON lines such as {{"source": "...", "target": "..."}}')
    return pairs


def require_scorers() -> None:
    """Raise ConfigError if the packages of the scores are not installed."""
    try:
        import rouge_score
        import sacrebleu
    except ImportError as error:
        raise ConfigError(f"--pairs: needs the packages rouge_score and sacrebleu ({error}); install megagpt[eval]") from None
    del rouge_score, sacrebleu


def text_scores(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return scores from 0 to 100.

    rouge1, rouge2, rougeL: mean F-measures of words with Porter's stemmer, by the package rouge_score; bleu and chrf: of the
    corpus, by sacrebleu.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu, corpus_chrf

    logging.getLogger("absl").setLevel(logging.WARNING)  # rouge_score logs a line about its tokenizer
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    each = [scorer.score(reference, text) for text, reference in zip(written, references, strict=True)]
    rouge = {name: 100 * sum(scores[name].fmeasure for scores in each) / len(each) for name in ROUGE}
    return rouge | {
        "bleu": corpus_bleu(list(written), [list(references)]).score,
        "chrf": corpus_chrf(list(written), [list(references)]).score,
    }
