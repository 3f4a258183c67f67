"""What one rank says to others in one optimizer step, by closed formulas; `parallel/traffic.py` counts the same.

Sources: Shoeybi et al., arXiv 1909.08053 (4 all-reduces of b s h a layer), Korthikanti et al., arXiv 2205.05198 (as many
pairs of reduce-scatter and all-gather under sequence parallelism), Narayanan et al., arXiv 2104.04473 (b s h a message),
Rajbhandari et al., arXiv 1910.02054 (ZeRO).
"""

from typing import NamedTuple

from megagpt.config.schema import Config
from megagpt.pipeline.partition import stage_layers

GRADIENT_BYTES = 4
"""Gradients are summed in fp32."""


class Amount(NamedTuple):
    """Calls, and bytes of the whole tensors that they sum, gather, scatter or move."""

    calls: int
    bytes: int


class Place(NamedTuple):
    """The rank that is asked about: which stages it has of how many, in a layout of these sizes."""

    stages: tuple[int, ...]
    n_stages: int
    tensor: int
    data: int
    """Ranks with the same parameters, context ranks among them."""
    context: int = 1


Traffic = dict[tuple[str, str], Amount]
"""By process group and call, as `parallel.traffic.Kind` names them."""


def step_traffic(config: Config, place: Place) -> Traffic:
    """All but the few bytes of gradient norms, and but the calls that several buckets of gradients take.

    For stages whose neighbours are on other ranks. Not for ZeRO 3.
    """
    traffic = tensor_traffic(config, place) | pipeline_traffic(config, place) | data_traffic(config, place)
    traffic |= context_traffic(config, place)
    return {kind: amount for kind, amount in traffic.items() if amount.calls}


def tensor_traffic(config: Config, place: Place) -> Traffic:
    """Within the layers: two sums forward and two backward each, one for the embedding, one for the output layer.

    The loss gathers three numbers a token of each rank. Full recompute makes the forward's sums again but the last of
    each group of blocks: it stops at the last tensor that the backward needs, which is before that one.
    """
    if place.tensor == 1:
        return {}
    model, batch, micro_batches = config.model, config.training.micro_batch_size, _micro_batches(config, place)
    again = sum(_sums_again(config, layers) for layers in _layers_of_stages(config, place))
    is_first, is_last = 0 in place.stages, place.n_stages - 1 in place.stages
    sums = micro_batches * (4 * _layers(config, place) + again + is_first + is_last)
    moved = Amount(sums, sums * batch * _positions(config, place) * model.n_embd * _activation_bytes(config))
    losses = micro_batches * is_last
    loss = Amount(losses, losses * batch * _positions(config, place) * 3 * 4 * place.tensor)
    if not config.parallel.sequence_parallel:
        return {("tensor", "all-reduce"): moved, ("tensor", "all-gather"): loss}
    partial = GRADIENT_BYTES * _partial_parameters(config, place)
    # Of what enters a layer's two products a rank keeps its own part: the rest is gathered again for their gradients.
    # Full recompute stops before the last sums of its groups, but not before the gathers.
    unstopped = 2 * _layers(config, place) - again if config.training.recompute == "full" else 0
    gathers = sums + micro_batches * (2 * _layers(config, place) + unstopped)
    gathered = gathers * batch * _positions(config, place) * model.n_embd * _activation_bytes(config)
    return {
        ("tensor", "reduce-scatter"): moved,
        ("tensor", "all-gather"): Amount(gathers + loss.calls, gathered + loss.bytes),
        ("tensor", "all-reduce"): Amount(len(place.stages), partial),
    }


def pipeline_traffic(config: Config, place: Place) -> Traffic:
    """An activation over each boundary forward and a gradient back; the tied embedding's gradient once a step."""
    model, micro_batches = config.model, _micro_batches(config, place)
    boundaries = sum((stage > 0) + (stage < place.n_stages - 1) for stage in place.stages)
    part = place.tensor if config.parallel.sequence_parallel else 1
    size = config.training.micro_batch_size * _positions(config, place) // part * model.n_embd * _activation_bytes(config)
    messages = Amount(micro_batches * boundaries, micro_batches * boundaries * size)
    has_end = (0 in place.stages) != (place.n_stages - 1 in place.stages)
    tied = int(model.tie_embeddings and has_end)
    ends = Amount(tied, tied * GRADIENT_BYTES * _vocabulary(config, place))
    return {("pipeline", "send"): messages, ("pipeline", "receive"): messages, ("ends", "all-reduce"): ends}


def data_traffic(config: Config, place: Place) -> Traffic:
    """Every gradient once, and under ZeRO 1 and 2 every parameter once; calls are one for each chunk at least."""
    if place.data == 1:
        return {}
    psi = rank_parameters(config, place)
    gradients = Amount(len(place.stages), GRADIENT_BYTES * psi)
    if config.zero.stage == 0:
        return {("data", "all-reduce"): gradients}
    return {("data", "all-reduce"): gradients, ("data", "all-gather"): Amount(1, _activation_bytes(config) * psi)}


def context_traffic(config: Config, place: Place) -> Traffic:
    """Queries, keys and values for all positions of some heads and the result back, forward and backward."""
    if place.context == 1:
        return {}
    passes = 3 if config.training.recompute == "full" else 2
    exchanges = passes * _layers(config, place) * _micro_batches(config, place)
    size = config.training.micro_batch_size * _positions(config, place) * config.model.n_embd // place.tensor
    return {("context", "all-to-all"): Amount(2 * exchanges, exchanges * 4 * size * _activation_bytes(config))}


def rank_parameters(config: Config, place: Place) -> int:
    """Parameters that the rank holds, padding rows of the vocabulary and a second copy of the tied embedding included."""
    model, t = config.model, place.tensor
    h, f = model.n_embd, model.ffn_width
    block = (3 * h * h + 3 * h) // t + h * h // t + h + (h * f + f) // t + f * h // t + h + 4 * h
    total = _layers(config, place) * block
    is_first, is_last = 0 in place.stages, place.n_stages - 1 in place.stages
    total += is_first * (_vocabulary(config, place) + model.n_positions * h)
    shared = is_first and model.tie_embeddings
    return total + is_last * (2 * h + (0 if shared else _vocabulary(config, place)))


def _partial_parameters(config: Config, place: Place) -> int:
    """Those to whose gradients each tensor rank adds its part of the sequence: norms, biases after a sum, positions."""
    model = config.model
    h = model.n_embd
    ends = (0 in place.stages) * model.n_positions * h + (place.n_stages - 1 in place.stages) * 2 * h
    return _layers(config, place) * (4 * h + 2 * h) + ends


def _vocabulary(config: Config, place: Place) -> int:
    return config.model.padded_vocab_size // place.tensor * config.model.n_embd


def _sums_again(config: Config, layers: int) -> int:
    """By the recompute of a stage's layers."""
    if config.training.recompute != "full":
        return 0
    return 2 * layers - -(-layers // config.training.recompute_layers)


def _layers(config: Config, place: Place) -> int:
    return sum(_layers_of_stages(config, place))


def _layers_of_stages(config: Config, place: Place) -> list[int]:
    layers = stage_layers(config.model, place.n_stages)
    return [len(layers[stage]) for stage in place.stages]


def _micro_batches(config: Config, place: Place) -> int:
    return config.training.global_batch_size // config.training.micro_batch_size * place.context // place.data


def _positions(config: Config, place: Place) -> int:
    """Of a sequence, those that the rank works on."""
    return config.model.n_positions // place.context


def _activation_bytes(config: Config) -> int:
    return 4 if config.training.precision == "fp32" else 2
