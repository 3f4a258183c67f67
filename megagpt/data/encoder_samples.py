"""Samples for a model with an encoder: a source that the encoder reads, and a target that the decoder writes."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.config.schema import ModelConfig
from megagpt.data.gpt_dataset import Sample
from megagpt.labels import IGNORED

PADDING = 0
"""Token that fills up a source and the decoder's input. It is never attended to and never in the loss."""


class EncoderFormat(NamedTuple):
    """What the encoder needs of a sample."""

    positions: int
    """Length of the source in tokens, with padding."""
    decoder_start: int
    """Token that the decoder's input begins with."""


def encoder_format(model: ModelConfig) -> EncoderFormat | None:
    """Return the format of a model's sources; None for a model without an encoder."""
    return EncoderFormat(model.source_length, model.decoder_start) if model.encoder_layers else None


def encoder_sample(source: npt.NDArray[np.int64], target: npt.NDArray[np.int64], length: int, encoder: EncoderFormat) -> Sample:
    """Return the sample of a source and a target.

    source: at most `encoder.positions` tokens; target: at most `length` tokens, the positions of the decoder.
    """
    tokens = np.full(length + 1, PADDING, np.int64)
    tokens[0] = encoder.decoder_start
    tokens[1 : len(target) + 1] = target
    labels = np.full(length, IGNORED, np.int64)
    labels[: len(target)] = target
    padded = np.full(encoder.positions, PADDING, np.int64)
    padded[: len(source)] = source
    starts = np.zeros(length + 1, np.bool_)
    return Sample(tokens, starts, labels, source=padded, source_length=len(source))
