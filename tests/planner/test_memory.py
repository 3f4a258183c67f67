"""The estimate of a rank's memory, compared with published formulas and with the bytes that a real forward saves."""

from dataclasses import replace

import pytest
import torch
from support.encoder_decoder import T5
from support.runs import Tree, full_model, tiny_config

from megagpt.config import Config
from megagpt.model.forward_context import MicroBatch
from megagpt.parallel.topology import Layout
from megagpt.planner.dry_run import open_dry_run
from megagpt.planner.memory import MemoryEstimate, largest_rank_memory, rank_memory
from megagpt.planner.parameters import parameter_count


def bytes_saved_by_a_real_forward(config: Config) -> int:
    model = full_model(config).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved_tensors: dict[int, torch.Tensor] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        if saved.untyped_storage().data_ptr() not in weights:
            saved_tensors[saved.untyped_storage().data_ptr()] = saved
        return saved

    tokens = torch.zeros(config.training.micro_batch_size, config.model.n_positions, dtype=torch.int64)
    batch = MicroBatch(tokens, tokens, samples=torch.arange(len(tokens)))
    if config.model.encoder_layers:
        source = torch.zeros(len(tokens), config.model.source_length, dtype=torch.int64)
        batch = replace(batch, source=source, source_lengths=torch.full((len(tokens),), source.shape[1]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        model(None, batch)
    return sum(saved.untyped_storage().nbytes() for saved in saved_tensors.values())


MODELS: dict[str, Tree] = {
    "GPT-2, dropout": {"resid_pdrop": 0.1, "attn_pdrop": 0.1},
    "grouped heads, gated MLP, windows": {
        "n_kv_head": 2,
        "gated_mlp": True,
        "activation": "silu",
        "norm": "rmsnorm",
        "position_embedding": "rotary",
        "attention_window": 5,
        "full_attention_every": 2,
        "tie_embeddings": False,
        "qk_norm": "head",
    },
    "norms on both sides, caps": {
        "norm": "rmsnorm",
        "norm_placement": "both",
        "attention_softcap": 5.0,
        "logit_softcap": 3.0,
        "n_kv_head": 1,
        "qk_norm": "width",
        "parallel_branches": "no",
    },
    "an encoder": T5,
    "parallel branches": {"parallel_branches": "two_norms", "position_embedding": "rotary", "rotary": {"fraction": 0.5}},
}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", MODELS)
def test_a_dry_run_saves_the_bytes_of_a_real_forward(model: str, recompute: str) -> None:
    config = tiny_config(model=MODELS[model], training={"recompute": recompute})
    with open_dry_run(config, Layout(), 0) as dry_run:
        assert dry_run.saved_bytes(0) == bytes_saved_by_a_real_forward(config)


@pytest.mark.parametrize(
    "stage, expected",
    [(0, 18.0), (1, 6 + 12 / 4), (2, 6 + 12 / 4), (3, 4 + 2 / 4 + 12 / 4)],
)
def test_bytes_per_parameter_are_those_of_the_zero_paper(stage: int, expected: float) -> None:
    """bf16 weights 2, fp32 gradients 4, fp32 master and Adam 12: Rajbhandari et al., arXiv 1910.02054, section 3.1."""
    config = tiny_config(training={"precision": "bf16"}, zero={"stage": stage}, model={"vocab_size": 64})
    memory = rank_memory(config, Layout(data=4), 0)
    assert memory.parameters == parameter_count(config)
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(expected * memory.parameters, rel=1e-4)


def test_an_offloaded_optimizer_needs_no_device_memory() -> None:
    config = tiny_config(zero={"stage": 2, "offload_optimizer": "cpu"})
    assert rank_memory(config, Layout(data=2), 0).optimizer == 0


def test_sgd_without_momentum_keeps_only_the_master_weights() -> None:
    plain = rank_memory(tiny_config(optimizer={"type": "sgd"}), Layout(), 0)
    momentum = rank_memory(tiny_config(optimizer={"type": "sgd", "momentum": 0.9}), Layout(), 0)
    assert (plain.optimizer, momentum.optimizer) == (4 * plain.parameters, 8 * plain.parameters)


def activations_by_stage(schedule: str, n_micro_batches: int = 8, **parallel: int) -> list[int]:
    config = tiny_config(
        model={"n_layer": 8, "vocab_size": 16},
        parallel={"pipeline": 4, "schedule": schedule, **parallel},
        training={"micro_batch_size": 2, "global_batch_size": 2 * n_micro_batches},
    )
    return [rank_memory(config, Layout(pipeline=4), rank).activations for rank in range(4)]


def test_one_f_one_b_keeps_one_micro_batch_fewer_on_every_next_stage() -> None:
    """Narayanan et al., arXiv 2104.04473, section 2.2: at most as many as there are stages left."""
    one = activations_by_stage("1f1b", n_micro_batches=1)
    assert activations_by_stage("1f1b") == [saved * (4 - stage) for stage, saved in enumerate(one)]


def test_gpipe_keeps_all_micro_batches() -> None:
    assert activations_by_stage("gpipe") == [8 * saved for saved in activations_by_stage("gpipe", n_micro_batches=1)]


def test_the_largest_rank_is_the_largest_of_all_ranks() -> None:
    config = tiny_config(parallel={"tensor": 2, "pipeline": 2}, training={"precision": "bf16"})
    layout = Layout(tensor=2, pipeline=2, data=2)
    estimates = [rank_memory(config, layout, rank) for rank in range(layout.world_size)]
    assert largest_rank_memory(config, layout).total == max(estimate.total for estimate in estimates)


def test_the_total_is_the_sum_of_all_parts() -> None:
    assert MemoryEstimate(1, 20, 300, 4000, 50000).total == 54320
