"""The model on the meta device: the names and shapes of the real one, without memory, and stages of equal cost."""

from typing import Any

import pytest
from support.runs import full_model, parameters_by_name, tiny_config

from megagpt.model.meta_model import meta_model, parameter_names, stage_layers
from megagpt.parallel.parameter import shard_of

TRILLION = {"n_layer": 128, "n_embd": 25600, "n_head": 160, "n_positions": 2048, "vocab_size": 51200}


@pytest.mark.parametrize("tied", [True, False])
def test_names_shapes_and_order_are_those_of_the_real_model(tied: bool) -> None:
    config = tiny_config(model={"tie_embeddings": tied})
    real, meta = parameters_by_name(full_model(config)), meta_model(config)
    assert parameter_names(meta) == list(real)
    for parameter in meta.parameters():
        assert parameter.is_meta
        assert parameter.shape == real[shard_of(parameter).name].shape
        assert shard_of(parameter) == shard_of(real[shard_of(parameter).name])


def test_a_model_of_a_trillion_parameters_needs_no_memory() -> None:
    parameters = list(meta_model(tiny_config(model=TRILLION)).parameters())
    assert sum(parameter.numel() for parameter in parameters) > 1e12
    assert all(parameter.is_meta for parameter in parameters)


def test_the_stages_of_a_model_count_embedding_and_output_layer() -> None:
    gpt3 = {"n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048, "vocab_size": 51200}
    parts = stage_layers(tiny_config(model=gpt3), 8)
    assert [layer for part in parts for layer in part] == list(range(96))
    assert len(parts[-1]) <= min(map(len, parts[:-1]))
    small: Any = {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257, "vocab_multiple": 128}
    # The output layer costs as much as 4.9 blocks.
    assert [len(part) for part in stage_layers(tiny_config(model=small), 4)] == [3, 4, 4, 1]


def test_more_stages_than_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="4 layers cannot fill 5 stages"):
        stage_layers(tiny_config(), 5)
