"""Search the strategies of a config on a number of GPUs: the fastest ones that fit. Does not import torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.config.rules import broken_rules, divisors
from megagpt.config.schema import Config
from megagpt.errors import ConfigError
from megagpt.planner.layers import is_explicit
from megagpt.planner.predict import PARTS, Planner, Prediction
from megagpt.planner.quick_estimate import QuickEstimate, QuickEstimator
from megagpt.planner.strategy import Strategy
from megagpt.schedules.registry import SCHEDULES

MAX_VIRTUAL_STAGES = 4
"""Largest number of chunks per rank that is tried."""
MAX_PIPELINE = 128
LONG_SEQUENCE = 8192
"""Sequence length from which context parallelism is tried."""
MAX_MICRO_BATCH = 32
SLACK = 1.05
"""Estimates of memory up to this much above the limit are predicted in full."""
CLOSE = 1.08
"""Strategies whose estimated time is within this factor of the best predicted one are predicted in full."""
MAX_PREDICTED = 24
"""Predictions with a simulated schedule, which take most of the time of a search."""


@dataclass(frozen=True)
class SearchResult:
    """Outcome of a search."""

    ranking: tuple[Prediction, ...]
    """The best prediction for each combination of tensor, pipeline, context and schedule, fastest first; all fit."""
    tried: int
    """Strategies that were estimated."""
    fitting: int
    """Those whose estimate fits."""
    too_large: QuickEstimate | None
    """The fastest estimate that does not fit, if it is faster than the best."""
    too_large_strategy: Strategy | None


def candidates(config: Config, gpus: int, gpus_per_node: int) -> Iterator[Strategy]:
    """Yield all strategies that the config's rules allow, and that are not worse than others for certain.

    Tensor parallelism stays within a node, and is always with sequence parallelism where that is possible.
    """
    for tensor, pipeline, context in _layouts(config, gpus, gpus_per_node):
        data = gpus // (tensor * pipeline * context)
        if config.training.global_batch_size % data:
            continue
        per_rank = config.training.global_batch_size // data
        splits_sequence = tensor > 1 and config.model.n_positions % (tensor * context) == 0
        for micro_batch in (size for size in divisors(per_rank) if size <= MAX_MICRO_BATCH):
            for zero in _zero_stages(config, pipeline, data * context):
                for schedule, virtual_stages in _schedules(config.model.n_layer, pipeline):
                    compiled = zero < 3 if config.training.compile == "auto" else config.training.compile
                    # Fused attention saves nothing that grows with the square of the sequence.
                    selective = ("selective",) if is_explicit(config.model, compiled) else ()
                    for recompute in ("none", *selective, "full"):
                        yield Strategy(
                            tensor,
                            pipeline,
                            context,
                            data,
                            schedule,
                            virtual_stages,
                            splits_sequence,
                            zero,
                            micro_batch,
                            per_rank // micro_batch,
                            recompute,
                            1,
                            compiled,
                        )


def _layouts(config: Config, gpus: int, gpus_per_node: int) -> Iterator[tuple[int, int, int]]:
    model = config.model
    for tensor in divisors(math.gcd(gpus, model.n_head)):
        if tensor > gpus_per_node or model.ffn_hidden_size % tensor or model.vocab_multiple % tensor:
            continue
        for pipeline in divisors(gpus // tensor):
            if pipeline > min(model.n_layer, MAX_PIPELINE):
                continue
            for context in divisors(gpus // tensor // pipeline):
                if context > 1 and (model.n_positions < LONG_SEQUENCE or context > gpus_per_node):
                    continue
                if model.n_head % (tensor * context) == 0 and model.n_positions % (tensor * context) == 0:
                    yield tensor, pipeline, context


def _zero_stages(config: Config, pipeline: int, shards: int) -> tuple[int, ...]:
    """Return the ZeRO stages that are tried: 2 needs as much memory at the peak as 1, because the gradients of all chunks exist
    until the last micro-batch, and 0 needs more."""
    if config.zero.offload_optimizer != "none":
        return (config.zero.stage,) if config.zero.stage < 3 or pipeline == 1 else ()
    if shards == 1 or pipeline > 1 or config.optimizer.type == "muon" or config.training.compile is True:
        return (1,)
    return (1, 3)


def _schedules(n_layer: int, pipeline: int) -> Iterator[tuple[str, int]]:
    if pipeline == 1:
        yield "1f1b", 1
        return
    for name, spec in SCHEDULES.items():
        if name == "gpipe":  # takes as long as 1f1b and needs more memory
            continue
        for virtual_stages in range(2, MAX_VIRTUAL_STAGES + 1) if spec.interleaved else (1,):
            chunks = virtual_stages if spec.interleaved else spec.fixed_chunks or 1
            if pipeline * chunks <= n_layer:
                yield name, virtual_stages


def search(planner: Planner, gpus: int) -> SearchResult:
    """Return the fastest strategies that fit. Raises ConfigError if none does, or if no layout is possible."""
    estimator = QuickEstimator(planner)
    limit = planner.hardware.usable_bytes
    found = [(strategy, estimator.estimate(strategy)) for strategy in candidates(planner.config, gpus, _node(planner))]
    if not found:
        raise ConfigError(
            f"--gpus {gpus}: no layout is possible with training.global_batch_size "
            f"{planner.config.training.global_batch_size} and model.n_layer {planner.config.model.n_layer}; "
            "choose a number of GPUs that divides the batch size, or shares factors with it"
        )
    fitting = sorted((pair for pair in found if pair[1].memory.total <= limit * SLACK), key=lambda pair: pair[1].seconds)
    predictions = _predict_best(planner, fitting)
    if not predictions:
        smallest = min(found, key=lambda pair: pair[1].memory.total)
        raise ConfigError(
            f"--gpus {gpus}: no layout fits in the {limit / 2**30:.1f} GiB that a run can use on {planner.hardware.gpu.name}; "
            "the smallest, "
            f"{smallest[0]}, needs {smallest[1].memory.total / 2**30:.1f} GiB; use more GPUs or larger ones"
        )
    faster = [pair for pair in found if pair[1].memory.total > limit * SLACK and pair[1].seconds < predictions[0].step_seconds]
    too_large = min(faster, key=lambda pair: pair[1].seconds, default=(None, None))
    return SearchResult(_best_of_each(predictions), len(found), len(fitting), too_large[1], too_large[0])


def nearest_that_fits(planner: Planner, strategy: Strategy) -> Prediction | None:
    """Return the prediction of the strategy with the fewest changes that fits the same GPUs, the fastest of them."""
    estimator, limit = QuickEstimator(planner), planner.hardware.usable_bytes
    fitting = []
    for candidate in candidates(planner.config, strategy.gpus, _node(planner)):
        estimate = estimator.estimate(candidate)
        if estimate.memory.total <= limit:
            fitting.append((_changes(strategy, candidate), estimate.seconds, candidate))
    for _, _, candidate in sorted(fitting, key=lambda entry: entry[:2])[:MAX_PREDICTED]:
        if not broken_rules(candidate.apply(planner.config)):
            prediction = planner.predict(candidate)
            if prediction.fits:
                return prediction
    return None


def _changes(old: Strategy, new: Strategy) -> int:
    """Return how far two strategies are apart; keys that change the layout count most."""
    weights = {"recompute": 1, "zero_stage": 1, "micro_batch": 1, "schedule": 2, "tensor": 4, "pipeline": 4, "context": 4}
    return sum(weight for key, weight in weights.items() if getattr(old, key) != getattr(new, key))


def reason(best: Prediction, other: Prediction) -> str:
    """Return why `other` is slower than `best`: the parts of the step that take longer."""
    differences = {name: other.parts.get(name, 0.0) - best.parts.get(name, 0.0) for name in PARTS}
    longer = sorted((name for name in PARTS if differences[name] > 0), key=lambda name: -differences[name])
    shown = [f"{name} +{differences[name]:.3g} s" for name in longer[:2] if differences[name] > 0.002 * best.step_seconds]
    return ", ".join(shown) or "equal to the best within the accuracy of the model"


def _predict_best(planner: Planner, fitting: list[tuple[Strategy, QuickEstimate]]) -> list[Prediction]:
    """Predict the candidates that may be the best, by their estimates; return those that fit, fastest first."""
    predictions: list[Prediction] = []
    seen: dict[tuple[object, ...], int] = {}
    n_predicted = 0
    for strategy, estimate in fitting:
        best = predictions[0].step_seconds if predictions else math.inf
        if n_predicted >= MAX_PREDICTED or (estimate.seconds > CLOSE * best and len(predictions) >= 8):
            break
        layout = (strategy.tensor, strategy.pipeline, strategy.context, strategy.schedule)
        if seen.get(layout, 0) >= 2:  # the list shows one of each
            continue
        if broken_rules(strategy.apply(planner.config)):
            continue
        prediction = planner.predict(strategy)
        n_predicted += 1
        if prediction.fits:
            seen[layout] = seen.get(layout, 0) + 1
            predictions = sorted([*predictions, prediction], key=lambda one: one.step_seconds)
    return predictions


def _best_of_each(predictions: list[Prediction]) -> tuple[Prediction, ...]:
    chosen: dict[tuple[object, ...], Prediction] = {}
    for prediction in predictions:
        strategy = prediction.strategy
        chosen.setdefault((strategy.tensor, strategy.pipeline, strategy.context, strategy.schedule), prediction)
    return tuple(chosen.values())


def _node(planner: Planner) -> int:
    return min(planner.hardware.gpus_per_node, 8)
