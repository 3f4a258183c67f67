"""What the embedding and the output layer cost on one rank, in closed form. Does not import torch."""

from megagpt.config.schema import Config
from megagpt.planner.layer_sizes import LOSS_CHUNK_MIB, LayerCost, Sizes, saved_by_norm
from megagpt.planner.strategy import Strategy
from megagpt.planner.work import Call, Work, elementwise, product, weight_gradient


def embedding_cost(config: Config, strategy: Strategy, length: int | None = None) -> LayerCost:
    """Return the cost of the embeddings at the start of a stack. `length`: its tokens; `model.n_positions` if absent."""
    sizes = Sizes(config, strategy, length)
    model, e = sizes.model, sizes.itemsize
    entries = model.padded_vocab_size // sizes.tensor
    positions = sizes.length * sizes.width if model.position_embedding == "learned" else 0
    size = sizes.tokens * sizes.width * e
    saved = 8 * sizes.tokens
    if model.embd_pdrop > 0:
        saved += sizes.own_tokens * sizes.width
    forward, backward = elementwise(2 * size + 3 * sizes.stream, 3), Work()
    if sizes.tensor > 1:
        forward += Work(calls=(Call("tensor", "reduce-scatter" if sizes.sequence_parallel else "all-reduce", size),))
    if sizes.sequence_parallel:
        backward += Work(calls=(Call("tensor", "all-gather", size),))
    weights = elementwise(size + entries * sizes.width * (2 * e + 8), 4)
    return LayerCost(
        entries * sizes.width + positions,
        positions if sizes.sequence_parallel else 0,
        saved,
        0,
        saved + size,
        entries * sizes.width * e,
        forward,
        backward,
        weights,
        0.0,
    )


def output_cost(config: Config, strategy: Strategy) -> LayerCost:
    """Return the cost of final norm, output layer and loss at the end of the last stage.

    The forward computes the gradients, too, because the logits exist only in chunks. The parameters are counted without the
    output layer's own weight.
    """
    sizes = Sizes(config, strategy)
    model, e, tokens = sizes.model, sizes.itemsize, sizes.tokens
    entries = model.padded_vocab_size // sizes.tensor
    size = tokens * sizes.width * e
    logits = tokens * entries * e
    limit = (config.training.loss_chunk_mib or LOSS_CHUNK_MIB[strategy.compiled]) * 2**20
    most = max(1, int(limit) // (entries * e))
    chunks = -(-tokens // most)
    forward = product(tokens, sizes.width, entries, e) + product(tokens, entries, sizes.width, e)
    forward += weight_gradient(tokens, sizes.width, entries, e)
    forward += elementwise(sizes.passes * (3 * logits + 2 * sizes.stream), 4 * chunks + 2)
    backward = elementwise(2 * size + 5 * sizes.stream, 3)
    if sizes.tensor > 1:
        statistics = Call("tensor", "all-gather", 12 * tokens * sizes.tensor / chunks, chunks)
        forward += Work(calls=(statistics,))
        if sizes.sequence_parallel:
            forward += Work(calls=(Call("tensor", "all-gather", size),))
            backward += Work(calls=(Call("tensor", "reduce-scatter", size),))
        else:
            backward += Work(calls=(Call("tensor", "all-reduce", size),))
    norm = sizes.norm_parameters()
    saved = sizes.stream + saved_by_norm(sizes) + size
    if model.encoder_layers and model.embd_pdrop > 0:
        saved += sizes.own_tokens * sizes.width
    return LayerCost(
        norm,
        norm if sizes.sequence_parallel else 0,
        saved,
        4 * entries * sizes.width,
        4 * entries * sizes.width,
        -(-tokens // chunks) * entries * e,
        forward,
        backward,
        elementwise(12 * entries * sizes.width),
        float(strategy.micro_batch * model.n_positions * 2 * model.padded_vocab_size * sizes.width),
    )
