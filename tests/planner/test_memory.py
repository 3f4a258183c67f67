"""The prediction of a rank's memory, compared with published formulas, dry runs of the modules and a real forward."""

from dataclasses import replace

import pytest
import torch
from support.encoder_decoder import T5
from support.exhaustive import EXHAUSTIVE, chosen
from support.runs import Tree, full_model, tiny_config

from megagpt.config import Config, load_config
from megagpt.config.find import shipped_configs
from megagpt.model.forward_context import MicroBatch
from megagpt.parallel.parameter import shard_of
from megagpt.parallel.topology import Layout
from megagpt.planner.dry_run import open_dry_run
from megagpt.planner.memory import MemoryEstimate, peak_memory, predict_memory
from megagpt.planner.parameters import parameter_count
from megagpt.planner.stages import StageModel
from megagpt.planner.step_simulation import Held, peak_held, peaks_in_flight
from megagpt.planner.strategy import Strategy
from megagpt.schedules.registry import SCHEDULES, chunks_per_rank, make_plan


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


def saved_by_formula(config: Config, strategy: Strategy) -> tuple[list[int], list[int], list[int]]:
    """Return parameters, those with partial gradients, and saved bytes of each stage, as the closed formulas have them."""
    stages = StageModel(config).stages(strategy)
    saved = [stage.saved - stage.held_beside for stage in stages]
    return [stage.parameters for stage in stages], [stage.partial for stage in stages], saved


def saved_by_dry_run(config: Config, strategy: Strategy) -> tuple[list[int], list[int], list[int]]:
    """Return the same, counted on the modules."""
    layout = Layout(strategy.tensor, strategy.pipeline, strategy.context, strategy.data)
    found: dict[int, tuple[int, int, int]] = {}
    for rank in layout.ranks_along(0, "pipeline"):
        with open_dry_run(config, layout, rank, strategy.compiled) as dry_run:
            for stage, chunk in dry_run.chunks.items():
                parameters = list(chunk.parameters())
                partial = sum(p.numel() for p in parameters if shard_of(p).partial_gradient)
                found[stage] = (sum(p.numel() for p in parameters), partial, dry_run.saved_bytes(stage))
    parameters, partials, saved = zip(*(found[stage] for stage in sorted(found)), strict=True)
    return list(parameters), list(partials), list(saved)


def shortened(name: str, *overrides: str) -> Config:
    """Return a shipped config with 3 layers in a stack, on at most two pipeline ranks: all layers are alike."""
    config = load_config(name)
    sizes = ["model.n_layer=3", f"parallel.pipeline={min(2, config.parallel.pipeline)}", "model.vocab_size=50176"]
    encoder = ["model.encoder_layers=3"] if config.model.encoder_layers else []
    return load_config(name, [*sizes, *encoder, *overrides])


USUAL = ("125M", "6B", "175B", "llama-3.1-8B", "pythia-1.4B", "olmo2-7B", "qwen3-8B", "quickstart_t5", "t5-v1.1-3B")


@pytest.mark.parametrize("name", chosen(sorted(shipped_configs()), *USUAL))
def test_the_formulas_are_those_of_the_modules_for_every_shipped_config(name: str) -> None:
    # It recomputes nothing: see test_without_a_gpu_a_trained_bias_keeps_the_scores_that_are_not_recomputed.
    config = shortened(name, *(["training.compile=false"] if name == "quickstart_t5" else []))
    parallel = config.parallel
    strategy = Strategy.of(config, 2 * parallel.tensor * parallel.pipeline)
    assert saved_by_formula(config, strategy) == saved_by_dry_run(config, strategy)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", chosen(["125M", "llama-3.1-8B", "qwen3-8B", "olmo2-7B"], "125M", "qwen3-8B"))
def test_the_formulas_are_those_of_the_modules_for_every_recomputation(name: str, compiled: bool, recompute: str) -> None:
    config = shortened(name, f"training.recompute={recompute}", "training.recompute_layers=2", "model.n_positions=256")
    strategy = Strategy.of(config, config.parallel.tensor, compiled)
    assert saved_by_formula(config, strategy) == saved_by_dry_run(config, strategy)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.resid_pdrop=0.1", "model.embd_pdrop=0.1"],
        ["parallel.context=2", "parallel.tensor=2"],
        ["training.precision=fp32", "parallel.tensor=2"],
        ["model.n_kv_head=1", "parallel.tensor=2", "parallel.context=2"],
    ],
)
@pytest.mark.parametrize("compiled", [False, True] if EXHAUSTIVE else [True])
@pytest.mark.parametrize("name", ["350M", "llama-3.2-1B"])
def test_the_formulas_are_those_of_the_modules_with_dropout_contexts_and_fp32(
    name: str, compiled: bool, overrides: list[str]
) -> None:
    config = shortened(name, "model.n_positions=256", *overrides)
    strategy = Strategy.of(config, config.parallel.tensor * config.parallel.context, compiled)
    assert saved_by_formula(config, strategy) == saved_by_dry_run(config, strategy)


SPLIT = ["parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.pipeline=3"]
ENCODERS = {
    "T5 v1.1": ["parallel.pipeline=3"],
    "T5 v1.1, full recompute": ["parallel.pipeline=2", "training.recompute=full", "training.recompute_layers=2"],
    "T5 v1.1, sequence parallel": SPLIT,
    "T5 v1.0, context 2": [
        "parallel.context=2",
        "parallel.tensor=2",
        "parallel.pipeline=3",
        "model.tie_embeddings=true",
        "model.gated_mlp=false",
        "model.activation=relu",
    ],
    "dropout": ["model.resid_pdrop=0.1", "model.embd_pdrop=0.1", "parallel.pipeline=3"],
    "rotary, nothing recomputed": ["model.position_embedding=rotary", "training.recompute=none", "parallel.pipeline=2"],
    "learned positions, layer norms": ["model.position_embedding=learned", "model.norm=layernorm", *SPLIT],
    "fp32, biases": [
        "training.precision=fp32",
        "model.qkv_bias=true",
        "model.attention_bias=true",
        "model.mlp_bias=true",
        *SPLIT,
    ],
    "grouped heads that tensor ranks share": ["model.n_kv_head=3", *SPLIT],
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "case",
    chosen(
        ENCODERS,
        "T5 v1.1, full recompute",
        "T5 v1.1, sequence parallel",
        "T5 v1.0, context 2",
        "dropout",
        "learned positions, layer norms",
        "grouped heads that tensor ranks share",
    ),
)
def test_the_formulas_are_those_of_the_modules_for_models_with_an_encoder(case: str, compiled: bool) -> None:
    config = shortened("t5-v1.1-base", "training.micro_batch_size=4", *ENCODERS[case])
    parallel = config.parallel
    strategy = Strategy.of(config, parallel.tensor * parallel.pipeline * parallel.context, compiled)
    assert saved_by_formula(config, strategy) == saved_by_dry_run(config, strategy)


@pytest.mark.parametrize(
    "overrides", [SPLIT, ["parallel.context=2", "training.precision=fp32"], ["model.n_kv_head=4", "parallel.tensor=2"]]
)
def test_without_a_gpu_a_trained_bias_keeps_the_scores_that_are_not_recomputed(overrides: list[str]) -> None:
    config = shortened("t5-v1.1-base", "training.micro_batch_size=4", "training.recompute=none", *overrides)
    parallel = config.parallel
    strategy = Strategy.of(config, parallel.tensor * parallel.pipeline * parallel.context, compiled=False)
    assert saved_by_formula(config, strategy) == saved_by_dry_run(config, strategy)


@pytest.mark.parametrize(
    ("shape", "before", "now"),
    [((12, 768, 12, 1024, 32), 12.0, 12.27), ((24, 1024, 16, 1024, 16), 18.9, None), ((24, 2048, 16, 2048, 4), 35.2, 35.41)],
)
def test_the_peak_on_one_h100_is_the_measured_one(
    shape: tuple[int, int, int, int, int], before: float, now: float | None
) -> None:
    """124M, 350M and 1.3B, in GiB, measured by torch's allocator; docs/performance.md. Eager before, compiled now."""
    layers, hidden, heads, length, batch = shape
    model = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "n_positions": length, "vocab_size": 50257}
    config = tiny_config(
        model={**model, "vocab_multiple": 128},
        training={"precision": "bf16", "micro_batch_size": batch, "global_batch_size": batch, "loss_chunk_mib": 1024},
    )
    eager, compiled = (peak_memory(config, Strategy.of(config, 1, compiled)).total / 2**30 for compiled in (False, True))
    assert eager == pytest.approx(before, rel=0.05)
    assert now is None or compiled == pytest.approx(now, rel=0.05)


def test_one_f_one_b_s_first_stage_has_the_activations_of_the_published_formula() -> None:
    """Korthikanti et al., arXiv 2205.05198, equation 5 with selective recomputation: 34 s b h L / t.

    Two of the 34 bytes are dropout masks, which are not saved here.
    """
    config = load_config("175B")
    memory = predict_memory(config, Strategy.of(config, 64))[0]
    expected = 32 * 2048 * 1 * 12288 * 96 / 8
    assert memory.activations == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "stage, expected",
    [(0, 18.0), (1, 6 + 12 / 4), (2, 6 + 4 / 4 + 12 / 4), (3, 4 + 2 / 4 + 12 / 4)],
)
def test_bytes_per_parameter_are_those_of_the_zero_paper(stage: int, expected: float) -> None:
    """bf16 weights 2, fp32 gradients 4, fp32 master and Adam 12: Rajbhandari et al., arXiv 1910.02054, section 3.1.

    Under ZeRO-2 the rank's own part of the gradients comes on top of those of all chunks, which exist until they are summed.
    """
    config = tiny_config(training={"precision": "bf16"}, zero={"stage": stage}, model={"vocab_size": 64})
    (memory,) = predict_memory(config, Strategy(data=4, zero_stage=stage, micro_batch=2, compiled=False))
    assert memory.parameters == parameter_count(config)
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(expected * memory.parameters, rel=1e-4)


def test_an_offloaded_optimizer_needs_no_device_memory() -> None:
    config = tiny_config(zero={"stage": 2, "offload_optimizer": "cpu"})
    assert peak_memory(config, Strategy.of(config, 2)).optimizer == 0


def test_sgd_without_momentum_keeps_only_the_master_weights() -> None:
    for momentum, n_bytes in ((0.0, 4), (0.9, 8)):
        config = tiny_config(optimizer={"type": "sgd", "momentum": momentum})
        memory = peak_memory(config, Strategy.of(config, 1))
        assert memory.optimizer == n_bytes * memory.parameters


def activations_by_rank(schedule: str, n_micro_batches: int = 8) -> list[int]:
    config = tiny_config(
        model={"n_layer": 8, "vocab_size": 16},
        parallel={"pipeline": 4, "schedule": schedule},
        training={"micro_batch_size": 2, "global_batch_size": 2 * n_micro_batches},
    )
    return [memory.activations for memory in predict_memory(config, Strategy.of(config, 4))]


def test_one_f_one_b_keeps_one_micro_batch_fewer_on_every_next_stage() -> None:
    """Narayanan et al., arXiv 2104.04473, section 2.2: at most as many as there are stages left."""
    one = activations_by_rank("1f1b", n_micro_batches=1)
    assert activations_by_rank("1f1b") == [saved * (4 - stage) for stage, saved in enumerate(one)]


def test_gpipe_keeps_all_micro_batches() -> None:
    assert activations_by_rank("gpipe") == [8 * saved for saved in activations_by_rank("gpipe", n_micro_batches=1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_peak_of_a_long_step_follows_from_shorter_ones(schedule: str) -> None:
    chunks = 2 if SCHEDULES[schedule].interleaved else 1
    held = [Held(1.0 + stage / 7, 0.9) for stage in range(3 * chunks_per_rank(schedule, chunks))]
    for micro_batches in (1, 2, 5, 12, 31, 44):
        plan = make_plan(schedule, 3, micro_batches, chunks)
        full = [peak_held(order, held) for order in plan.actions]
        assert list(peaks_in_flight(schedule, chunks, 3, micro_batches, held)) == pytest.approx(full)


def test_the_total_is_the_sum_of_all_parts() -> None:
    assert MemoryEstimate(1, 20, 300, 4000, 50000, 600000, 7000000).total == 7654320
