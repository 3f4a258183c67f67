"""Predicted communication, FLOPs and times of a step, against dry runs of the modules, published runs and closed formulas."""

import statistics
from functools import cache

import pytest
from support.exhaustive import chosen
from support.runs import Tree, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from megagpt.config import Config, load_config
from megagpt.config.find import shipped_configs
from megagpt.errors import ConfigError
from megagpt.model.meta_model import stage_layers
from megagpt.parallel.topology import Layout
from megagpt.planner.dry_run import open_dry_run
from megagpt.planner.flops import training_flops_per_token
from megagpt.planner.gradient_sums import gradient_sums
from megagpt.planner.hardware import Hardware, find_hardware
from megagpt.planner.layer_sizes import LOSS_CHUNK_MIB
from megagpt.planner.parameters import parameter_count
from megagpt.planner.predict import Planner, Prediction
from megagpt.planner.published_runs import published_runs
from megagpt.planner.rank_work import rank_traffic
from megagpt.planner.stage_times import stage_work
from megagpt.planner.stages import StageModel
from megagpt.planner.strategy import Strategy
from megagpt.planner.traffic import step_traffic
from megagpt.schedules.registry import placement

H100 = find_hardware("H100")


CONFIGS = sorted(shipped_configs())


def shortened(name: str, *overrides: str) -> Config:
    """Return a shipped config with 3 layers in a stack, at most two pipeline ranks and two micro-batches."""
    config = load_config(name)
    sizes = ["model.n_layer=3", f"parallel.pipeline={min(2, config.parallel.pipeline)}", "model.vocab_size=50176"]
    batch = f"training.global_batch_size={4 * config.training.micro_batch_size}"
    chunks = f"training.loss_chunk_mib={LOSS_CHUNK_MIB[True]}"  # of a GPU, also in the dry run
    encoder = ["model.encoder_layers=3"] if config.model.encoder_layers else []
    return load_config(name, [*sizes, *encoder, batch, chunks, *overrides])


NO_SEQUENCE_PARALLELISM = ["parallel.sequence_parallel=false"]
LAYOUTS = {
    "6B, no sequence parallelism": ("6B", NO_SEQUENCE_PARALLELISM),
    "6B, full recompute": ("6B", ["training.recompute=full", "training.recompute_layers=2", "model.n_layer=4"]),
    "6B, full recompute, no sequence parallelism": ("6B", ["training.recompute=full", *NO_SEQUENCE_PARALLELISM]),
    "350M, context 2, ZeRO-0": ("350M", ["parallel.context=2", "zero.stage=0"]),
    "llama, context 2, full recompute": ("llama-3.2-1B", ["parallel.context=2", "training.recompute=full"]),
    "6B, zbv": ("6B", ["parallel.schedule=v_half", "model.n_layer=5"]),
    "1.3B, ZeRO-3": ("1.3B", ["zero.stage=3"]),
    "T5, no sequence parallelism, full recompute": ("t5-v1.1-3B", [*NO_SEQUENCE_PARALLELISM, "training.recompute=full"]),
    "T5, pipeline 3": ("t5-v1.1-3B", ["parallel.pipeline=3"]),
    "T5, context 2, ZeRO-0": ("t5-v1.1-3B", ["parallel.context=2", "parallel.pipeline=2", "zero.stage=0"]),
    "T5, tied, zbv": ("t5-v1.1-base", ["parallel.pipeline=3", "parallel.schedule=zbv", "model.tie_embeddings=true"]),
    "T5, grouped heads that tensor ranks share": ("t5-v1.1-3B", ["model.n_kv_head=1", "parallel.pipeline=2"]),
    "T5, ZeRO-3": ("t5-v1.1-base", ["zero.stage=3"]),
}


USUAL = (
    "125M",
    "6B",
    "llama-3.1-8B",
    "t5-v1.1-3B",
    "6B, full recompute",
    "350M, context 2, ZeRO-0",
    "llama, context 2, full recompute",
    "6B, zbv",
    "1.3B, ZeRO-3",
    "T5, pipeline 3",
    "T5, tied, zbv",
    "T5, grouped heads that tensor ranks share",
)


@pytest.mark.parametrize("case", chosen([*CONFIGS, *LAYOUTS], *USUAL))
def test_calls_and_bytes_of_every_collective_are_those_of_the_dry_run(case: str) -> None:
    name, overrides = LAYOUTS.get(case, (case, []))
    config = shortened(name, *overrides)
    parallel = config.parallel
    strategy = Strategy.of(config, 2 * parallel.tensor * parallel.pipeline * parallel.context, compiled=False)
    layout = Layout(strategy.tensor, strategy.pipeline, strategy.context, strategy.data)
    for rank in layout.ranks_along(0, "pipeline"):
        expected = step_traffic(config, layout, rank)
        predicted = rank_traffic(config, strategy, layout.coordinates(rank).pipeline)
        keys = {key for key in expected if key.call != "receive"}
        assert predicted.keys() == {(key.group, key.call) for key in keys}
        for key in keys:
            calls, n_bytes = predicted[key.group, key.call]
            assert n_bytes == pytest.approx(expected[key].bytes, rel=1e-12), key
            if key.group != "dp_cp" and key != ("tensor", "all-reduce"):  # gradients are summed in buckets
                assert calls == pytest.approx(expected[key].calls), key


@pytest.mark.parametrize(
    "name", chosen(["125M", "6B", "llama-3.1-8B", "pythia-1.4B", "olmo2-7B", "t5-v1.1-3B"], "6B", "llama-3.1-8B", "t5-v1.1-3B")
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_flops_of_matrix_products_are_those_that_the_modules_compute(name: str, recompute: str) -> None:
    config = shortened(name, f"training.recompute={recompute}")
    compiled = not config.model.encoder_layers  # without a GPU, the products of attention with a trained bias are counted
    strategy = Strategy.of(config, config.parallel.tensor * config.parallel.pipeline, compiled)
    layout = Layout(strategy.tensor, strategy.pipeline)
    with open_dry_run(config, layout, 0, compiled) as dry_run, FlopCounterMode(display=False) as counter:
        dry_run.forward_backward()
    work = stage_work(config, strategy, StageModel(config).stages(strategy)[0])
    products = sum(one.product_flops for one in (work.forward, work.input_backward, work.weight_backward))
    assert counter.get_total_flops() == products


@pytest.mark.parametrize("name", ["125M", "175B", "llama-3.1-8B", "pythia-1.4B", "olmo2-7B", "qwen3-8B", "t5-v1.1-11B"])
def test_parameters_and_model_flops_are_those_of_the_meta_model(name: str) -> None:
    config = load_config(name)
    strategy = Strategy.of(config, config.parallel.tensor * config.parallel.pipeline)
    prediction = Planner(config, H100).predict(strategy)
    assert prediction.parameters == parameter_count(config)
    assert prediction.model_flops // prediction.tokens == training_flops_per_token(config)


def test_recomputed_flops_are_those_of_the_published_formula() -> None:
    """Korthikanti et al., arXiv 2205.05198, equations 7 and 8: s / (6 h) becomes s / (3 h) with selective recomputation."""
    config = load_config("22B")
    prediction = Planner(config, H100).predict(Strategy.of(config, 8))
    layers, hidden, length, vocab = 48, 6144, 2048, 51200
    matrices = 1 + vocab / (12 * hidden * layers)
    ratio = (matrices + length / (3 * hidden)) / (matrices + length / (6 * hidden))
    # Equation 8 recomputes the scores' share of the forward and backward; a forward is a third of it.
    recomputed = (prediction.hardware_flops / prediction.model_flops - 1) * 3
    assert recomputed == pytest.approx(ratio - 1, rel=1e-6)


RUNS = published_runs()


@cache
def errors() -> dict[str, float]:
    """Return the absolute relative errors of the published runs, by their names."""
    return {run.name: abs(run.error()) for run in RUNS}


def test_published_speeds_are_predicted_within_10_percent_in_the_median_and_20_at_worst() -> None:
    assert len(errors()) == len(RUNS)
    assert statistics.median(errors().values()) < 0.1
    assert max(errors().values()) < 0.2


def test_at_most_a_third_of_the_published_runs_was_used_for_the_fit() -> None:
    assert 3 * sum(run.fitted for run in RUNS) <= len(RUNS)
    others = [errors()[run.name] for run in RUNS if not run.fitted]
    assert statistics.median(others) < 0.1


def predict(gpus: int, hardware: Hardware = H100, **sections: Tree) -> Prediction:
    config = tiny_config(
        **{
            **sections,
            "model": {
                "n_layer": 8,
                "n_embd": 2048,
                "n_head": 16,
                "n_positions": 2048,
                "vocab_size": 51200,
                **sections.get("model", {}),
                "vocab_multiple": 128,
            },
            "training": {"precision": "bf16", "micro_batch_size": 1, "global_batch_size": 64, **sections.get("training", {})},
        }
    )
    return Planner(config, hardware).predict(Strategy.of(config, gpus))


def test_the_parts_of_a_step_add_up() -> None:
    for prediction in (
        predict(1),
        predict(16, parallel={"tensor": 2, "pipeline": 4, "sequence_parallel": True}),
        predict(8, parallel={"pipeline": 2, "schedule": "zbv"}),
        predict(4, zero={"stage": 3}),
        predict(8, parallel={"context": 2, "tensor": 2}),
    ):
        assert sum(prediction.parts.values()) == pytest.approx(prediction.step_seconds)
        assert min(prediction.parts.values()) > -1e-9


def test_a_slower_network_slows_only_what_crosses_nodes() -> None:
    slow = find_hardware("H100", "25GbE")
    inside, across = {"parallel": {"tensor": 8}}, {"parallel": {"pipeline": 2, "tensor": 8}}
    assert predict(8, slow, **inside).step_seconds == predict(8, **inside).step_seconds
    assert predict(16, slow, **across).step_seconds > predict(16, **across).step_seconds


def test_the_bubble_is_that_of_the_published_formula() -> None:
    """Narayanan et al., arXiv 2104.04473, section 2.2: p - 1 of m + p - 1 micro-batches, if all stages are equal.

    Besides, a rank waits for two messages before each micro-batch, and the last one of p for none.
    """
    prediction = predict(4, parallel={"pipeline": 4}, model={"vocab_size": 128})
    time, message = prediction.times[1].forward + prediction.times[1].backward, prediction.transfer
    expected = 1 - 64 * time / (67 * time + 2 * 64 * message * 3 / 4 + 2 * 3 * message)
    assert prediction.bubble == pytest.approx(expected, abs=0.005)


def test_fp8_makes_the_blocks_products_faster_but_not_their_weight_gradients() -> None:
    """Of six FLOPs per weight four have 8 bits; a GPU without such products is refused."""
    wide, narrow = (predict(1, training={"precision": name, "micro_batch_size": 16}) for name in ("bf16", "fp8"))
    ratio = narrow.parts["matrix products"] / wide.parts["matrix products"]
    assert 4 / 6 < ratio < 1
    assert narrow.mfu > wide.mfu and narrow.memory == wide.memory
    with pytest.raises(ConfigError, match="A100-80GB has no fp8 matrix products"):
        predict(1, find_hardware("A100-80GB"), training={"precision": "fp8"})


def test_what_is_not_covered_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^lora\.rank: the planner covers runs that train all weights"):
        Planner(tiny_config(lora={"rank": 4}), H100)


def test_gradient_sums_have_every_parameter_once() -> None:
    for schedule in ("1f1b", "zbv"):
        config = tiny_config(parallel={"pipeline": 2, "schedule": schedule})
        strategy = Strategy.of(config, 4)
        stages = StageModel(config).stages(strategy)
        owners = placement(schedule, 2)
        total = 0.0
        for rank in range(2):
            own = [stage for stage, owner in enumerate(owners) if owner == rank]
            sums = gradient_sums(config, strategy, stages, own)
            calls = [call for one in (*sums.by_stage, sums.shared) for call in one if call.axis == "dp_cp"]
            total += sum(call.bytes for call in calls) / 4
        copies = config.model.padded_vocab_size * config.model.n_embd if schedule == "1f1b" else 0
        padding = (config.model.padded_vocab_size - 61) * config.model.n_embd
        assert total == parameter_count(config) + copies + padding


def test_layers_of_encoder_and_decoder_are_divided_as_the_modules_divide_them() -> None:
    for name, n_stages in (("t5-v1.1-base", 3), ("t5-v1.1-large", 5), ("t5-v1.1-11B", 8)):
        config = load_config(name, ["model.encoder_positions=512", "model.n_positions=256"])
        assert list(StageModel(config).split(n_stages)) == stage_layers(config, n_stages)
