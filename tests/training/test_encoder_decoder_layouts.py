"""A model with an encoder trains under every layout as in one process.

Tolerances as in test_layouts.py. SGD, so that a wrong scale of a gradient changes the weights. The encoder has other numbers of
layers and of positions than the decoder; sources have padding.
"""

from typing import Any

import pytest
from support.encoder_decoder import t5_config
from support.exhaustive import chosen
from support.pool import Pool
from support.runs import Tree, compare, train

from megagpt.model.meta_model import stage_layers

STEPS = 2
SGD: Tree = {"type": "sgd", "learning_rate": 0.3, "clip_grad": 0.0, "weight_decay": 0.0}
RUN: Tree = {"optimizer": SGD, "model": {"encoder_layers": 5, "n_layer": 3}}
BATCH: Tree = {"global_batch_size": 8}
LAYOUTS: dict[str, tuple[int, Tree, int]] = {
    "tensor 4, sequence parallel": (4, {"tensor": 4, "sequence_parallel": True}, 1),
    "pipeline 2, ZeRO-0": (2, {"pipeline": 2}, 0),
    "pipeline 4, gpipe": (4, {"pipeline": 4, "schedule": "gpipe"}, 1),
    "pipeline 8": (8, {"pipeline": 8}, 1),
    "pipeline 4, zb_h1": (4, {"pipeline": 4, "schedule": "zb_h1"}, 2),
    "pipeline 2 x data 2, zbv": (4, {"pipeline": 2, "schedule": "zbv"}, 2),
    "pipeline 2 x tensor 2, interleaved": (
        4,
        {"pipeline": 2, "tensor": 2, "schedule": "interleaved_1f1b", "virtual_stages": 4},
        1,
    ),
    "pipeline 2, interleaved zero bubble": (2, {"pipeline": 2, "schedule": "interleaved_zero_bubble", "virtual_stages": 3}, 1),
    "pipeline 4, v_half": (4, {"pipeline": 4, "schedule": "v_half"}, 1),
    "pipeline 2 x data 2, v_min": (4, {"pipeline": 2, "schedule": "v_min"}, 0),
    "data 2, ZeRO-3": (2, {}, 3),
    "context 2 x tensor 2 x pipeline 2, sequence parallel": (
        8,
        {"context": 2, "tensor": 2, "pipeline": 2, "sequence_parallel": True},
        2,
    ),
}


@pytest.fixture(scope="module")
def one_process(ranks: Pool) -> Any:
    """The results of one process."""
    return ranks.run(1, train, t5_config(training=BATCH, **RUN), STEPS)


USUAL = (
    "tensor 4, sequence parallel",
    "pipeline 4, zb_h1",
    "pipeline 2 x data 2, zbv",
    "pipeline 2 x tensor 2, interleaved",
    "data 2, ZeRO-3",
    "context 2 x tensor 2 x pipeline 2, sequence parallel",
)


@pytest.mark.parametrize("name", chosen(LAYOUTS, *USUAL))
def test_a_layout_trains_as_one_process_does(name: str, ranks: Pool, one_process: Any) -> None:
    world, parallel, stage = LAYOUTS[name]
    compare(
        ranks.run(world, train, t5_config(training=BATCH, parallel=parallel, zero={"stage": stage}, **RUN), STEPS), one_process
    )


DROPOUT: Tree = {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.1, "mlp_pdrop": 0.2}
UNLIKE: dict[str, tuple[Tree, Tree, Tree]] = {
    "dropout, selective recompute": ({"model": DROPOUT}, {"pipeline": 2, "tensor": 2}, {"recompute": "selective"}),
    "dropout, full recompute, context": ({"model": DROPOUT}, {"pipeline": 2, "context": 2}, {"recompute": "full"}),
    "untied, smaller micro-batches": ({"model": {"tie_embeddings": False}}, {"pipeline": 4}, {"micro_batch_size": 1}),
    "frozen encoder": ({"training": {"freeze": ["encoder.*", "embedding.*"]}}, {"pipeline": 4, "schedule": "zb_h1"}, {}),
    "frozen decoder": ({"training": {"freeze": ["layers.*", "decoder.*"]}}, {"pipeline": 2, "schedule": "zbv"}, {}),
    "LoRA": ({"lora": {"rank": 2}, "optimizer": {"learning_rate": 0.02}}, {"pipeline": 2, "tensor": 2}, {}),
}


@pytest.mark.parametrize(
    "name", chosen(UNLIKE, "dropout, full recompute, context", "untied, smaller micro-batches", "frozen encoder", "LoRA")
)
def test_options_of_a_run_do_not_depend_on_the_layout(name: str, ranks: Pool) -> None:
    run, parallel, training = UNLIKE[name]
    sections = {key: {**RUN.get(key, {}), **keys} for key, keys in {**RUN, **run}.items()}
    common = {**BATCH, **sections.pop("training", {})}
    expected = ranks.run(1, train, t5_config(training=common, **sections), STEPS)
    compare(ranks.run(4, train, t5_config(training={**common, **training}, parallel=parallel, **sections), STEPS), expected)


def test_stages_count_the_layers_of_both_stacks() -> None:
    """A decoder layer with as many positions costs more than an encoder layer; one of a much shorter target costs less."""
    wide: Tree = {"encoder_layers": 6, "n_layer": 6, "n_embd": 256, "vocab_size": 16}
    even = stage_layers(t5_config(model={**wide, "encoder_positions": 256, "n_positions": 256}), 2)
    assert even == [range(7), range(7, 12)]
    short = stage_layers(t5_config(model={**wide, "encoder_positions": 256, "n_positions": 16}), 2)
    assert short == [range(4), range(4, 12)]
