"""Every layout gives the losses, gradient norms and weights of a single process.

Tolerances, fp32: relative 1e-5 on losses and norms; 5e-6 absolute on weights of size 0.2 that Adam moves by up to 1e-2 per
step (eps 1e-4, so that Adam's own normalisation does not hide a wrong gradient scale); sums in another order differ by
about 1e-7. The gradient norm is at least five times the clip norm of 0.05 in every step.
"""

from typing import Any

import pytest
from support.exhaustive import chosen
from support.pool import Pool
from support.runs import Tree, compare, full_weights, tiny_config, train

STEPS = 2
LAYOUTS: dict[str, tuple[int, Tree, int]] = {
    "tensor 2": (2, {"tensor": 2}, 1),
    "tensor 4": (4, {"tensor": 4}, 1),
    "pipeline 2, ZeRO-0": (2, {"pipeline": 2}, 0),
    "pipeline 4": (4, {"pipeline": 4}, 1),
    "pipeline 4, gpipe": (4, {"pipeline": 4, "schedule": "gpipe"}, 1),
    "pipeline 4, zb_h1": (4, {"pipeline": 4, "schedule": "zb_h1"}, 2),
    "pipeline 2, zbv, tied on one rank": (2, {"pipeline": 2, "schedule": "zbv"}, 0),
    "pipeline 2 x data 2, zbv": (4, {"pipeline": 2, "schedule": "zbv"}, 2),
    "pipeline 2, interleaved": (2, {"pipeline": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2}, 1),
    "2 x 2 x 2, interleaved zero bubble, sequence parallel": (
        8,
        {
            "tensor": 2,
            "pipeline": 2,
            "schedule": "interleaved_zero_bubble",
            "virtual_stages": 2,
            "sequence_parallel": True,
        },
        2,
    ),
    "2 x 2 x 2, zbv": (8, {"tensor": 2, "pipeline": 2, "schedule": "zbv"}, 1),
    "pipeline 2 x data 2, v_half": (4, {"pipeline": 2, "schedule": "v_half"}, 2),
    "pipeline 2 x tensor 2, v_min": (4, {"pipeline": 2, "tensor": 2, "schedule": "v_min"}, 1),
    "data 2, ZeRO-0": (2, {}, 0),
    "data 2, ZeRO-1": (2, {}, 1),
    "data 2, ZeRO-2": (2, {}, 2),
    "data 2, ZeRO-3": (2, {}, 3),
    "context 2": (2, {"context": 2}, 1),
    "context 4, ZeRO-2": (4, {"context": 4}, 2),
    "context 2, ZeRO-3": (2, {"context": 2}, 3),
    "context 2 x data 2, ZeRO-0": (4, {"context": 2}, 0),
    "context 2 x tensor 2 x pipeline 2, sequence parallel": (
        8,
        {"context": 2, "tensor": 2, "pipeline": 2, "sequence_parallel": True},
        2,
    ),
    "2 x 2 x 2, ZeRO-0": (8, {"tensor": 2, "pipeline": 2}, 0),
    "2 x 2 x 2, ZeRO-1": (8, {"tensor": 2, "pipeline": 2}, 1),
    "2 x 2 x 2, ZeRO-2": (8, {"tensor": 2, "pipeline": 2}, 2),
    "2 x 2 x 2, sequence parallel": (8, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 1),
    "2 x 2 x 2, sequence parallel, ZeRO-0": (8, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 0),
}


@pytest.fixture(scope="module")
def single_process(ranks: Pool) -> Any:
    """The results of one process."""
    results = ranks.run(1, train, tiny_config(), STEPS)
    assert min(results[0]["norms"]) > 5 * tiny_config().optimizer.clip_grad
    return results


USUAL = (
    "tensor 4",
    "pipeline 2, ZeRO-0",
    "pipeline 4, gpipe",
    "pipeline 4, zb_h1",
    "pipeline 2, zbv, tied on one rank",
    "2 x 2 x 2, interleaved zero bubble, sequence parallel",
    "pipeline 2 x data 2, v_half",
    "pipeline 2 x tensor 2, v_min",
    "data 2, ZeRO-2",
    "data 2, ZeRO-3",
    "context 4, ZeRO-2",
    "context 2 x tensor 2 x pipeline 2, sequence parallel",
    "2 x 2 x 2, ZeRO-1",
    "2 x 2 x 2, sequence parallel, ZeRO-0",
)


@pytest.mark.parametrize("name", chosen(LAYOUTS, *USUAL))
def test_a_layout_trains_as_one_process_does(name: str, ranks: Pool, single_process: Any) -> None:
    world, parallel, stage = LAYOUTS[name]
    results = ranks.run(world, train, tiny_config(parallel=parallel, zero={"stage": stage}), STEPS)
    compare(results, single_process)


def test_twenty_steps_stay_together_and_a_run_repeats_its_bits(ranks: Pool) -> None:
    """Relative 1e-5 on every loss under another layout; the same bits under the same one."""
    parallel = {"tensor": 2, "pipeline": 2, "schedule": "zbv", "sequence_parallel": True}
    small: Tree = {"training": {"global_batch_size": 8}}
    config = tiny_config(parallel=parallel, zero={"stage": 2}, **small)
    long, again = ranks.run(8, train, config, 20), ranks.run(8, train, config, 5)
    assert long[0]["losses"][:5] == again[0]["losses"] and long[0]["norms"][:5] == again[0]["norms"]
    single = ranks.run(1, train, tiny_config(**small), 20)
    assert long[0]["losses"] == pytest.approx(single[0]["losses"], rel=1e-5)


@pytest.mark.parametrize("name", ["2 x 2 x 2, ZeRO-1", "data 2, ZeRO-0"])
def test_gradients_have_the_right_scale_which_plain_sgd_shows(name: str, ranks: Pool) -> None:
    world, parallel, stage = LAYOUTS[name]
    sgd = {"type": "sgd", "learning_rate": 0.5, "clip_grad": 0.0, "weight_decay": 0.0}
    reference = ranks.run(1, train, tiny_config(optimizer=sgd), 5)
    compare(ranks.run(world, train, tiny_config(optimizer=sgd, parallel=parallel, zero={"stage": stage}), 5), reference)


def test_an_untied_output_layer_trains_as_on_one_process(ranks: Pool) -> None:
    untied: Tree = {"model": {"tie_embeddings": False}}
    reference = ranks.run(1, train, tiny_config(**untied), 3)
    compare(ranks.run(4, train, tiny_config(parallel={"tensor": 2, "pipeline": 2}, **untied), 3), reference)


def test_layers_that_do_not_divide_are_split_unevenly_and_none_is_lost(ranks: Pool) -> None:
    odd: Tree = {"model": {"n_layer": 3}}
    reference = ranks.run(1, train, tiny_config(**odd), 3)
    results = ranks.run(2, train, tiny_config(parallel={"pipeline": 2}, **odd), 3)
    compare(results, reference)
    assert {name for name in full_weights(results) if ".mlp.up.weight" in name} == {
        f"layers.{i}.mlp.up.weight" for i in range(3)
    }


def test_tensor_ranks_that_hold_only_padding_of_the_vocabulary_train_as_one_process_does(ranks: Pool) -> None:
    tiny_vocabulary: Tree = {"model": {"vocab_size": 17}}  # padded to 32: 8 entries per rank
    reference = ranks.run(1, train, tiny_config(**tiny_vocabulary), 3)
    compare(ranks.run(4, train, tiny_config(parallel={"tensor": 4}, **tiny_vocabulary), 3), reference)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", chosen(["tensor 2", "2 x 2 x 2, ZeRO-2", "data 2, ZeRO-3"], "tensor 2", "data 2, ZeRO-3"))
def test_recompute_does_not_change_losses_or_norms(recompute: str, name: str, ranks: Pool, single_process: Any) -> None:
    world, parallel, stage = LAYOUTS[name]
    config = tiny_config(parallel=parallel, zero={"stage": stage}, training={"recompute": recompute})
    results = ranks.run(world, train, config, STEPS)
    assert results[0]["losses"] == pytest.approx(single_process[0]["losses"], rel=1e-5)
    assert results[0]["norms"] == pytest.approx(single_process[0]["norms"], rel=1e-5)


DROPOUT: Tree = {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.1}
SGD: Tree = {"type": "sgd", "learning_rate": 0.1, "clip_grad": 0.0, "weight_decay": 0.0}
DROPOUT_LAYOUTS: dict[str, tuple[int, Tree, int, Tree]] = {
    "larger micro-batches": (1, {}, 1, {"micro_batch_size": 8}),
    "data 4, ZeRO-3, smaller micro-batches": (4, {}, 3, {"micro_batch_size": 1}),
    "tensor 2": (2, {"tensor": 2}, 1, {}),
    "tensor 4, sequence parallel, selective recompute": (
        4,
        {"tensor": 4, "sequence_parallel": True},
        1,
        {"recompute": "selective"},
    ),
    "context 2, ZeRO-3": (2, {"context": 2}, 3, {}),
    "context 2 x tensor 2, sequence parallel": (4, {"context": 2, "tensor": 2, "sequence_parallel": True}, 2, {}),
    "pipeline 2 x data 2, zbv, full recompute": (4, {"pipeline": 2, "schedule": "zbv"}, 2, {"recompute": "full"}),
    "tensor 2 x pipeline 2 x context 2, 1f1b": (8, {"tensor": 2, "pipeline": 2, "context": 2}, 1, {}),
}


@pytest.fixture(scope="module")
def single_process_with_dropout(ranks: Pool) -> Any:
    """The results of one process with SGD, whose weights show the gradients; each kind of dropout changes them."""
    results, *others = (
        ranks.run(1, train, tiny_config(model=model, optimizer=SGD), 3)
        for model in (DROPOUT, *({**DROPOUT, key: 0.0} for key in DROPOUT))
    )
    for other in others:
        assert abs(other[0]["losses"][0] - results[0]["losses"][0]) > 1e-3
    return results


@pytest.mark.parametrize(
    "name",
    chosen(
        DROPOUT_LAYOUTS,
        "larger micro-batches",
        "tensor 4, sequence parallel, selective recompute",
        "context 2, ZeRO-3",
        "pipeline 2 x data 2, zbv, full recompute",
    ),
)
def test_dropout_is_the_same_under_every_layout(name: str, ranks: Pool, single_process_with_dropout: Any) -> None:
    world, parallel, stage, training = DROPOUT_LAYOUTS[name]
    config = tiny_config(model=DROPOUT, optimizer=SGD, parallel=parallel, zero={"stage": stage}, training=training)
    compare(ranks.run(world, train, config, 3), single_process_with_dropout)
