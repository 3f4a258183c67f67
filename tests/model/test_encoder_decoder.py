"""A model with an encoder: T5's logits and gradients, padding, and what each position sees."""

from dataclasses import replace

import pytest
import torch
from support.encoder_decoder import t5_config
from support.runs import Tree, full_model, micro_batches, parameters_by_name
from torch import Tensor

from megagpt.errors import ConfigError
from megagpt.model.chunk import shared_parameters
from megagpt.model.encoder_decoder import EncoderDecoderChunk
from megagpt.model.forward_context import MicroBatch
from megagpt.model.meta_model import stage_layers


def model_and_batch(**model: object) -> tuple[EncoderDecoderChunk, MicroBatch]:
    """Return a tiny model and a micro-batch with sources of different lengths."""
    config = t5_config(model=model, training={"micro_batch_size": 4})
    batch = micro_batches(config, 0, 0, 1)[0]
    return full_model(config), replace(batch, source_lengths=torch.tensor([24, 1, 9, 13]))


def logits(model: EncoderDecoderChunk, batch: MicroBatch) -> Tensor:
    assert batch.source is not None
    return model.logits(batch.source, batch.tokens, batch.source_lengths)


POSITIONS = ["relative", "learned", "rotary", "none"]


@pytest.mark.parametrize("positions", POSITIONS)
def test_tokens_of_the_padding_change_no_logit_and_other_tokens_do(positions: str) -> None:
    model, batch = model_and_batch(position_embedding=positions)
    assert batch.source is not None and batch.source_lengths is not None
    padding = torch.arange(24) >= batch.source_lengths.unsqueeze(1)
    before, changed = logits(model, batch), (batch.source + 1) % 61
    assert torch.equal(logits(model, replace(batch, source=torch.where(padding, changed, batch.source))), before)
    for row, last in enumerate((batch.source_lengths - 1).tolist()):
        source = batch.source.clone()
        source[row, last] = changed[row, last]
        after = logits(model, replace(batch, source=source))
        assert (after != before).flatten(1).any(1).nonzero().flatten().tolist() == [row]
        assert bool((after[row] != before[row]).any(-1).all())  # every decoder position sees every token of the source


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_decoder_position_sees_itself_and_earlier_ones(positions: str) -> None:
    model, batch = model_and_batch(position_embedding=positions)
    before = logits(model, batch)
    tokens = batch.tokens.clone()
    tokens[:, 7] = (tokens[:, 7] + 1) % 61
    after = logits(model, replace(batch, tokens=tokens))
    assert (after != before).any(-1).any(0).nonzero().flatten().tolist() == list(range(7, 16))


def test_the_encoder_distinguishes_the_order_of_tokens_by_its_relative_bias_only() -> None:
    """Without positions, the output of a permuted source is the permuted output. The bias differs for both directions."""
    source = torch.arange(24).unsqueeze(0)
    for positions, is_equal in (("none", True), ("relative", False)):
        model, _ = model_and_batch(position_embedding=positions)
        forward, backward = model.encode(source), model.encode(source.flip(1)).flip(1)
        assert torch.allclose(forward, backward, atol=1e-5) == is_equal


def test_the_names_of_shared_parameters_are_those_of_the_model() -> None:
    """Each stage's copies, for stages that end inside of a stack, and one that has the end of the encoder and more."""
    config = t5_config(model={"encoder_layers": 3, "n_layer": 3})
    names = parameters_by_name(full_model(config))
    assert shared_parameters(config, [range(2), range(2, 4), range(4, 6)]) == {
        "embedding.token.weight": [0, 1, 2],
        "encoder.relative_bias.weight": [0, 1],
        "decoder.relative_bias.weight": [1, 2],
    }
    shared = shared_parameters(config, stage_layers(config, 6))
    assert shared.keys() <= names.keys()
    assert shared["embedding.token.weight"] == [0, 3, 5]
    untied = t5_config(model={"encoder_layers": 3, "n_layer": 3, "tie_embeddings": False})
    assert shared_parameters(untied, stage_layers(untied, 6))["embedding.token.weight"] == [0, 3]


RULES: list[tuple[Tree, str]] = [
    ({"position_embedding": "alibi"}, 'position_embedding: "alibi" does not work with model.encoder_layers 4; expected "rel'),
    ({"attention_window": 3}, "attention_window: 3 does not work with model.encoder_layers 4; expected null"),
    ({"relative_buckets": 6, "relative_max_distance": 20}, "expected a multiple of 4, for example 4"),
    ({"encoder_layers": 0}, "encoder_positions: has no effect without an encoder"),
]


@pytest.mark.parametrize("keys, message", RULES)
def test_options_that_do_not_work_with_an_encoder_are_errors(keys: Tree, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        t5_config(model=keys)
