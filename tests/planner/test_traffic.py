"""Communication counted in a dry run of one rank: equal to a real step's, to the byte, and to the published formulas.

The dry run is in this process, without other ranks. The real step runs on the pool's ranks.
"""

from collections import Counter
from typing import Any

import pytest
from support.encoder_decoder import T5
from support.exhaustive import chosen
from support.pool import Pool
from support.products import MatrixProducts
from support.runs import Tree, create_engine, tiny_config, train_step

from megagpt.config import Config
from megagpt.model.meta_model import stage_layers
from megagpt.parallel.topology import Layout
from megagpt.parallel.vocab_loss import CHUNK_MIB
from megagpt.planner.collective_counter import CollectiveCounter, TrafficKey
from megagpt.planner.dry_run import open_dry_run
from megagpt.planner.traffic import Amount, Traffic, step_traffic
from megagpt.schedules.registry import SCHEDULES, chunks_per_rank, placement

LAYOUTS: dict[str, tuple[int, Tree]] = {
    "tensor 2": (2, {"parallel": {"tensor": 2}}),
    "tensor 4": (4, {"parallel": {"tensor": 4}}),
    "tensor 2, full recompute": (2, {"parallel": {"tensor": 2}, "training": {"recompute": "full"}}),
    "tensor 2, sequence parallel": (2, {"parallel": {"tensor": 2, "sequence_parallel": True}}),
    "pipeline 2": (2, {"parallel": {"pipeline": 2}}),
    "pipeline 4, untied": (4, {"parallel": {"pipeline": 4}, "model": {"tie_embeddings": False}}),
    "data 2, ZeRO-0": (2, {"zero": {"stage": 0}}),
    "data 2, ZeRO-1": (2, {"zero": {"stage": 1}}),
    "data 2, ZeRO-2": (2, {"zero": {"stage": 2}}),
    "tensor 2, full recompute in groups of 3 layers": (
        2,
        {"parallel": {"tensor": 2}, "training": {"recompute": "full", "recompute_layers": 3}},
    ),
    "pipeline 2, interleaved": (2, {"parallel": {"pipeline": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2}}),
    "context 2": (2, {"parallel": {"context": 2}}),
    "context 2 x tensor 2, sequence parallel, full recompute": (
        4,
        {"parallel": {"context": 2, "tensor": 2, "sequence_parallel": True}, "training": {"recompute": "full"}},
    ),
    "2 x 2 x 2": (8, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "2 x 2 x 2, sequence parallel": (8, {"parallel": {"tensor": 2, "pipeline": 2, "sequence_parallel": True}}),
}
_GROUPED: Tree = {"n_kv_head": 2, "gated_mlp": True, "norm": "rmsnorm", "position_embedding": "rotary", "qk_norm": "width"}
FAMILIES: dict[str, tuple[int, Tree]] = {
    "grouped heads, gated MLP, tensor 2": (2, {"parallel": {"tensor": 2}, "model": _GROUPED}),
    "fewer key and value heads than ranks, sequence parallel": (
        4,
        {"parallel": {"tensor": 4, "sequence_parallel": True}, "model": {**_GROUPED, "tie_embeddings": False}},
    ),
    "fewer key and value heads than context ranks": (
        4,
        {"parallel": {"tensor": 2, "context": 2}, "model": {**_GROUPED, "qk_norm": "head", "attention_window": 5}},
    ),
    "parallel branches, norms of Gemma, pipeline 2": (
        4,
        {"parallel": {"tensor": 2, "pipeline": 2}, "model": {"norm": "rmsnorm_plus_one", "parallel_branches": "two_norms"}},
    ),
}
FAMILIES["an encoder, pipeline 4, sequence parallel"] = (
    8,
    {"parallel": {"tensor": 2, "pipeline": 4, "sequence_parallel": True}, "model": T5, "zero": {"stage": 0}},
)
LARGE: dict[str, tuple[int, Tree]] = {
    "a quarter of GPT-3 175B on 512 ranks": (
        512,
        {
            "model": {"n_layer": 24, "n_embd": 12288, "n_head": 96, "n_positions": 2048, "vocab_size": 50257},
            "training": {"micro_batch_size": 1, "global_batch_size": 64, "precision": "bf16"},
            "parallel": {"tensor": 8, "pipeline": 8, "sequence_parallel": True},
        },
    ),
    "tensor 4 x pipeline 3 x data 5 x context 2": (
        120,
        {
            "model": {"n_layer": 9, "n_embd": 64, "n_head": 8, "n_positions": 32},
            "training": {"micro_batch_size": 3, "global_batch_size": 30, "recompute": "full", "recompute_layers": 2},
            "parallel": {"tensor": 4, "pipeline": 3, "context": 2},
            "zero": {"stage": 2},
        },
    ),
}


def layout_of(config: Config, world: int) -> Layout:
    parallel = config.parallel
    data = world // (parallel.tensor * parallel.pipeline * parallel.context)
    return Layout(tensor=parallel.tensor, pipeline=parallel.pipeline, context=parallel.context, data=data)


def measure_step(config: Config) -> tuple[Traffic, int]:
    """Return what this rank communicates in its second step, and how many parameters it has."""
    engine = create_engine(config)
    for step in range(2):
        with CollectiveCounter(engine.topology) as counter:
            train_step(engine, step)
    n_parameters = sum(parameter.numel() for parameter in engine.parameters)
    engine.close()
    return {key: Amount(counter.calls[key], counter.bytes[key]) for key in counter.calls}, n_parameters


def dry_run(config: Config, layout: Layout, rank: int) -> tuple[Traffic, int]:
    """Return the same of a dry run."""
    with open_dry_run(config, layout, rank) as run:
        n_parameters = run.n_parameters
    return step_traffic(config, layout, rank), n_parameters


USUAL = (
    "pipeline 4, untied",
    "data 2, ZeRO-0",
    "data 2, ZeRO-2",
    "tensor 2, full recompute in groups of 3 layers",
    "context 2 x tensor 2, sequence parallel, full recompute",
    "2 x 2 x 2, sequence parallel",
    "fewer key and value heads than ranks, sequence parallel",
    "parallel branches, norms of Gemma, pipeline 2",
    "an encoder, pipeline 4, sequence parallel",
)


@pytest.mark.parametrize("name", chosen([*LAYOUTS, *FAMILIES], *USUAL))
def test_a_real_step_communicates_what_the_dry_run_counts_and_nothing_else(name: str, ranks: Pool) -> None:
    world, sections = {**LAYOUTS, **FAMILIES}[name]
    config = tiny_config(**sections)
    layout = layout_of(config, world)
    by_stage = {layout.coordinates(rank).pipeline: dry_run(config, layout, rank) for rank in layout.ranks_along(0, "pipeline")}
    for rank, (measured, n_parameters) in enumerate(ranks.run(world, measure_step, config)):
        expected, expected_parameters = by_stage[layout.coordinates(rank).pipeline]
        assert n_parameters == expected_parameters
        for key in measured.keys() | expected.keys():
            if key.group in ("model_parallel", "other"):  # gradient norms; groups of one rank, in which nothing is moved
                continue
            if key == ("dp_cp", "all-reduce") and config.zero.stage > 0:
                assert measured[key].bytes <= 64  # the gradient norm
                continue
            assert key in expected, (name, key, measured[key])
            if key.group == "dp_cp":  # in as many calls as there are buckets or owners; padding besides
                assert 0 <= measured[key].bytes - expected[key].bytes <= 64, (name, key)
                assert measured[key].calls >= expected[key].calls, (name, key)
            else:
                assert measured[key] == expected[key], (name, key)


def test_norms_and_overflow_checks_are_a_few_bytes(ranks: Pool) -> None:
    for measured, _ in ranks.run(8, measure_step, tiny_config(**LAYOUTS["2 x 2 x 2"][1])):
        assert measured[TrafficKey("model_parallel", "all-reduce")].bytes <= 64


class Formulas:
    """The published formulas, for one rank. For stages whose neighbours are on other ranks. Not for ZeRO 3.

    Shoeybi et al., arXiv 1909.08053 (4 all-reduces of b s h per layer); Korthikanti et al., arXiv 2205.05198 (as many pairs
    of reduce-scatter and all-gather under sequence parallelism); Narayanan et al., arXiv 2104.04473 (b s h per message);
    Rajbhandari et al., arXiv 1910.02054 (ZeRO); Jacobs et al., arXiv 2309.14509 (4 all-to-alls per layer, of queries, keys
    and values and of the result).
    """

    def __init__(self, config: Config, layout: Layout, rank: int) -> None:
        parallel, training, model = config.parallel, config.training, config.model
        n_stages = layout.pipeline * chunks_per_rank(parallel.schedule, parallel.virtual_stages)
        owners = placement(parallel.schedule, layout.pipeline, parallel.virtual_stages)
        stages = [stage for stage, owner in enumerate(owners) if owner == layout.coordinates(rank).pipeline]
        self.config = config
        self.layout = layout
        self.stages = stages
        self.layers_of_stages = [len(stage_layers(config, n_stages)[stage]) for stage in stages]
        self.layers = sum(self.layers_of_stages)
        self.is_first = 0 in stages
        self.is_last = n_stages - 1 in stages
        self.boundaries = sum((stage > 0) + (stage < n_stages - 1) for stage in stages)
        self.m = training.global_batch_size // training.micro_batch_size // layout.data
        self.itemsize = 4 if training.precision == "fp32" else 2
        self.tokens = training.micro_batch_size * model.n_positions // layout.context
        self.bsh = self.tokens * model.n_embd * self.itemsize
        self.embedding = model.padded_vocab_size // layout.tensor * model.n_embd

    def traffic(self) -> Traffic:
        amounts = self.tensor() | self.pipeline() | self.zero() | self.context()
        return {TrafficKey(*key): Amount(*amount) for key, amount in amounts.items() if amount[0]}

    def tensor(self) -> Any:
        """Two sums forward and two backward per layer, one for the embedding, one for the output layer.

        The loss gathers three numbers per token from each rank. Full recompute repeats the sums of the forward except the
        last one of each group of blocks: it stops at the last tensor that the backward needs, which is before that sum.
        """
        if self.layout.tensor == 1:
            return {}
        full, group = self.config.training.recompute == "full", self.config.training.recompute_layers
        repeated = sum(2 * layers - -(-layers // group) for layers in self.layers_of_stages) if full else 0
        sums = self.m * (4 * self.layers + repeated + self.is_first + self.is_last)
        entries = self.config.model.padded_vocab_size // self.layout.tensor
        logits_bytes = self.tokens * entries * self.itemsize
        chunks = -(-logits_bytes // (CHUNK_MIB["cpu"] * 2**20))  # the device of the dry run
        losses = self.m * self.is_last * chunks
        loss_bytes = self.m * self.is_last * self.tokens * 3 * 4 * self.layout.tensor
        if not self.config.parallel.sequence_parallel:
            return {("tensor", "all-reduce"): (sums, sums * self.bsh), ("tensor", "all-gather"): (losses, loss_bytes)}
        # A rank saves only its own range of the input of the two column-parallel layers, so each backward gathers it again.
        # Full recompute stops before the last sum of a group, but not before the gathers.
        not_stopped = 2 * self.layers - repeated if full else 0
        gathers = sums + self.m * (2 * self.layers + not_stopped)
        return {
            ("tensor", "reduce-scatter"): (sums, sums * self.bsh),
            ("tensor", "all-gather"): (gathers + losses, gathers * self.bsh + loss_bytes),
            ("tensor", "all-reduce"): (len(self.stages), 4 * self.partial_parameters()),
        }

    def partial_parameters(self) -> int:
        """Norms, biases after a sum and positions: each tensor rank computes their gradients from its range of positions."""
        h = self.config.model.n_embd
        return self.layers * 6 * h + self.is_first * self.config.model.n_positions * h + self.is_last * 2 * h

    def pipeline(self) -> Any:
        """An activation over each boundary forward and a gradient back; the tied embedding's gradient once per step."""
        messages = self.m * self.boundaries
        size = self.bsh // (self.layout.tensor if self.config.parallel.sequence_parallel else 1)
        shares_embedding = int(self.config.model.tie_embeddings and self.is_first != self.is_last)
        return {
            ("pipeline", "send"): (messages, messages * size),
            ("pipeline", "receive"): (messages, messages * size),
            ("embedding", "all-reduce"): (shares_embedding, shares_embedding * 4 * self.embedding),
        }

    def zero(self) -> Any:
        """An all-reduce moves 2 psi per rank, psi being the parameters. ZeRO 1 and 2 also gather psi updated parameters."""
        if self.layout.dp_cp == 1:
            return {}
        psi = self.parameters()
        if self.config.zero.stage == 0:
            separate = int(self.config.model.tie_embeddings and (self.is_first or self.is_last))  # the tied embedding, last
            return {("dp_cp", "all-reduce"): (len(self.stages) + separate, 4 * psi)}
        return {("dp_cp", "reduce"): (len(self.stages), 4 * psi), ("dp_cp", "all-gather"): (1, self.itemsize * psi)}

    def context(self) -> Any:
        if self.layout.context == 1:
            return {}
        passes = 3 if self.config.training.recompute == "full" else 2
        exchanges = passes * self.layers * self.m
        return {("context", "all-to-all"): (2 * exchanges, exchanges * 4 * self.bsh // self.layout.tensor)}

    def parameters(self) -> int:
        """Parameters of the rank, with padding of the vocabulary and a second copy of the tied embedding."""
        model, t = self.config.model, self.layout.tensor
        h, f = model.n_embd, model.ffn_hidden_size
        block = (3 * h * h + 3 * h) // t + h * h // t + h + (h * f + f) // t + f * h // t + h + 4 * h
        first = self.embedding + model.n_positions * h
        shared = self.is_first and model.tie_embeddings
        last = 2 * h + (0 if shared else self.embedding)
        return self.layers * block + self.is_first * first + self.is_last * last


@pytest.mark.parametrize("name", [*LAYOUTS, *LARGE])
def test_the_dry_run_counts_what_the_published_formulas_say(name: str) -> None:
    world, sections = {**LAYOUTS, **LARGE}[name]
    config = tiny_config(**sections)
    layout = layout_of(config, world)
    stages = layout.ranks_along(world - 1, "pipeline")
    for rank in sorted({stages[0], stages[len(stages) // 2], stages[-1]}):
        traffic, n_parameters = dry_run(config, layout, rank)
        formulas = Formulas(config, layout, rank)
        assert n_parameters == formulas.parameters()
        expected = formulas.traffic()
        large_gradients = TrafficKey("tensor", "all-reduce")  # of 175B: in two buckets on the stage of the positions
        if config.parallel.sequence_parallel and name in LARGE and layout.coordinates(rank).pipeline == 0:
            expected[large_gradients] = expected[large_gradients]._replace(calls=2)
        assert traffic == expected


def traffic_and_products(config: Config) -> tuple[Traffic, list[tuple[int, int, int]]]:
    """Return this rank's calls and bytes in the tensor group in one step, and its matrix products."""
    engine = create_engine(config)
    with CollectiveCounter(engine.topology) as counter, MatrixProducts() as products:
        train_step(engine, 0)
    engine.close()
    keys = [key for key in counter.calls if key.group == "tensor"]
    return {key: Amount(counter.calls[key], counter.bytes[key]) for key in keys}, products.shapes


def test_every_schedule_makes_the_same_calls_and_products(ranks: Pool) -> None:
    """A split backward that computed anything twice would show."""
    totals = {}
    for name, schedule in SCHEDULES.items():
        chunks = {"virtual_stages": 2} if schedule.interleaved else {}
        parallel = {"tensor": 2, "pipeline": 2, "schedule": name, **chunks}
        config = tiny_config(parallel=parallel, training={"micro_batch_size": 2, "global_batch_size": 8})
        results = ranks.run(4, traffic_and_products, config)
        calls, n_bytes = Counter(), Counter()
        for traffic, _ in results:
            calls.update({key: amount.calls for key, amount in traffic.items()})
            n_bytes.update({key: amount.bytes for key, amount in traffic.items()})
        totals[name] = (calls, n_bytes, sorted(shape for _, shapes in results for shape in shapes))
    assert len(totals["1f1b"][2]) >= 4 * 4 * (4 * 4 // 2) * 3  # ranks x micro-batches x matrices of 2 layers x 3 products
    for name, total in totals.items():
        assert total == totals["1f1b"], name


def test_stages_of_encoder_and_decoder_send_and_sum_what_closed_formulas_say() -> None:
    """A stage of the encoder hands on b s h numbers, one of the decoder b (s + t) h. Tensor ranks sum 4 b s h for an encoder
    layer; for a decoder layer 3 b t h forward and 3 b t h + b s h backward: keys and values read the encoder's output. s and t:
    tokens of source and target.
    """
    config = tiny_config(model=T5, parallel={"tensor": 2, "pipeline": 8}, zero={"stage": 0})
    layout, micro_batches, h = Layout(tensor=2, pipeline=8), 8, 32
    source, target = 4 * 2 * 24 * h, 4 * 2 * 16 * h  # bytes of a micro-batch
    received = [0] + [source] * 4 + [source + target] * 3  # by each of 8 stages with one layer
    for stage in range(1, 7):
        traffic = step_traffic(config, layout, layout.ranks_along(0, "pipeline")[stage])
        assert traffic[TrafficKey("pipeline", "send")].bytes == micro_batches * (received[stage] + received[stage + 1])
        summed = (
            4 * source if stage < 4 else 6 * target + source + (target if stage == 4 else 0)
        )  # with the decoder's embedding
        assert traffic[TrafficKey("tensor", "all-reduce")].bytes == micro_batches * summed
