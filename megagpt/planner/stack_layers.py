"""What the layers of a model with an encoder cost on one rank, in closed form. Does not import torch.

As `megagpt/model/stacks.py` and `megagpt/model/stack_attention.py` define them.
"""

from megagpt.config.schema import Config
from megagpt.planner.attention_core import Core
from megagpt.planner.layer_sizes import LayerCost, Sizes, exchanged_kv, own_kv, saved_by_norm
from megagpt.planner.layers import self_attention_block
from megagpt.planner.strategy import Strategy
from megagpt.planner.work import Call, Overlap, Work, elementwise, product, weight_gradient

NO_WORK = Work()


def encoder_block_cost(config: Config, strategy: Strategy) -> LayerCost:
    """Return the cost of a block of the encoder."""
    sizes = source_sizes(config, strategy)
    return self_attention_block(sizes, _self_attention_core(sizes), sizes.length)


def decoder_block_cost(config: Config, strategy: Strategy) -> LayerCost:
    """Return the cost of a block of the decoder: self-attention, cross-attention and an MLP."""
    sizes = Sizes(config, strategy)
    own = self_attention_block(sizes, _self_attention_core(sizes), sizes.length)
    return own + _cross_attention_cost(sizes, source_sizes(config, strategy))


def source_sizes(config: Config, strategy: Strategy) -> Sizes:
    """Return the sizes of the encoder's tensors."""
    return Sizes(config, strategy, config.model.source_length)


def _self_attention_core(sizes: Sizes) -> Core:
    """Return the core of self-attention. The decoder's mask is added to the scores, so all of them are computed."""
    biased = sizes.model.position_embedding == "relative"
    # The gradient of a bias needs scores in memory without a GPU.
    is_explicit = sizes.model.attn_pdrop > 0 or (biased and not sizes.compiled)
    bias = _scores(sizes, sizes) * sizes.itemsize if biased and not is_explicit else 0
    return Core(sizes, sizes.length, sizes.tokens, is_explicit, _saved_by_core(sizes, sizes, is_explicit), bias)


def _scores(queries: Sizes, keys: Sizes) -> int:
    """Return the numbers in the scores of all of a rank's heads."""
    return queries.heads * queries.tokens * keys.length


def _saved_by_core(queries: Sizes, keys: Sizes, is_explicit: bool) -> int:
    e = queries.itemsize
    out = queries.tokens * queries.query * e
    if queries.strategy.recompute == "selective":
        return out
    if is_explicit:
        if queries.model.attn_pdrop > 0:
            return out + _scores(queries, keys) * (2 * e + 1)
        # In fp32: the scores, and queries, keys and values, each for all heads, instead of those that are counted elsewhere.
        elsewhere = out + 2 * (exchanged_kv if queries.strategy.context > 1 else own_kv)(queries)
        return out + 4 * (3 * queries.tokens * queries.query + _scores(queries, keys)) - elsewhere
    rotated = queries is keys and queries.model.position_embedding == "rotary"
    moved_out = rotated or queries.strategy.context > 1
    return out + 4 * queries.heads * queries.tokens + (out if moved_out else 0)


def _cross_attention_cost(sizes: Sizes, source: Sizes) -> LayerCost:
    """Return the cost of cross-attention and its norm. `sizes`: of the decoder, whose queries read the encoder's output."""
    model, t, e, strategy = sizes.model, sizes.tensor, sizes.itemsize, sizes.strategy
    width, query, kv = sizes.width, sizes.query, 2 * sizes.kv
    explicit = model.attn_pdrop > 0
    core = Core(sizes, source.length, source.tokens, explicit, _saved_by_core(sizes, source, explicit))
    parameters = (
        width * (2 * query + kv) + model.qkv_bias * (query + kv) + model.attention_bias * width + sizes.norm_parameters()
    )
    partial = model.attention_bias * width + sizes.norm_parameters() if sizes.sequence_parallel else 0
    if t > 1 and sizes.kv_split != t:
        partial += width * kv + model.qkv_bias * kv
    columns = ((sizes, query), (source, kv))
    forward, inputs, weights = core.forward, core.backward, NO_WORK
    for side, n_out in columns:
        forward += product(side.tokens, width, n_out, e, sizes.narrow)
        grad_input, grad_weight = (
            product(side.tokens, n_out, width, e, sizes.narrow),
            weight_gradient(side.tokens, width, n_out, e),
        )
        inputs, weights = inputs + grad_input, weights + grad_weight
        size = side.tokens * width * e
        if sizes.sequence_parallel:
            forward += Work(calls=(Call("tensor", "all-gather", size),))
            inputs += Work(overlaps=(Overlap(Call("tensor", "reduce-scatter", size), grad_weight),))
            weights += Work(overlaps=(Overlap(Call("tensor", "all-gather", size), grad_input),))
        elif t > 1:
            inputs += Work(overlaps=(Overlap(Call("tensor", "all-reduce", size), grad_weight),))
    forward += product(sizes.tokens, query, width, e, sizes.narrow)
    inputs += product(sizes.tokens, width, query, e, sizes.narrow)
    weights += weight_gradient(sizes.tokens, query, width, e)
    size = sizes.tokens * width * e
    if t > 1:
        forward += Work(calls=(Call("tensor", "reduce-scatter" if sizes.sequence_parallel else "all-reduce", size),))
    if sizes.sequence_parallel:
        inputs += Work(calls=(Call("tensor", "all-gather", size),))
    forward += elementwise(sizes.passes * 4.5 * sizes.stream, 2) + _exchanges(sizes, source)
    # The gradient of the encoder's output is added to that of the other layers.
    inputs += elementwise(sizes.passes * (5 * sizes.stream + 3 * source.stream), 3) + _exchanges(sizes, source)
    saved = 2 * sizes.stream + saved_by_norm(sizes) + core.saved + _saved_heads(sizes, source)
    if model.resid_pdrop > 0:
        saved += 8 * sizes.own_tokens if sizes.compiled else sizes.own_tokens * width
    full = strategy.recompute == "full"
    if strategy.recompute == "selective":
        inputs += core.forward
    elif full:
        inputs += forward
    deferred = sizes.stream + (sizes.tokens * (2 * query + width) + source.tokens * kv) * e
    return LayerCost(
        parameters,
        partial,
        0 if full else saved,
        0,
        deferred,
        saved * strategy.recompute_layers if full else 0,
        forward,
        inputs,
        weights,
        _cross_flops(sizes, source),
    )


def _saved_heads(sizes: Sizes, source: Sizes) -> int:
    """Return the bytes of the queries of the decoder and of the keys and values of the encoder's output."""
    query, kv = sizes.tokens * sizes.query * sizes.itemsize, source.tokens * sizes.kv * sizes.itemsize
    if sizes.strategy.context > 1:
        return query + 2 * exchanged_kv(source)
    if sizes.kv_split == sizes.tensor:
        return query + 2 * kv
    keys = own_kv(source)  # copies of the heads that this rank needs, and their numbers
    return query + 2 * keys + 16 * keys // (source.tokens * sizes.model.head_size * sizes.itemsize)


def _exchanges(sizes: Sizes, source: Sizes) -> Work:
    """Return the exchanges of queries, of keys with values, and of the output between the context ranks."""
    if sizes.strategy.context == 1:
        return NO_WORK
    query, pair = sizes.tokens * sizes.query * sizes.itemsize, 2 * exchanged_kv(source)
    calls = (Call("context", "all-to-all", query, 2), Call("context", "all-to-all", pair))
    return Work(moved=3 * (2 * query + pair), kernels=9, calls=calls)


def _cross_flops(sizes: Sizes, source: Sizes) -> float:
    """Return the forward FLOPs of cross-attention for a micro-batch, unsharded."""
    model = sizes.model
    query, kv = model.n_head * model.head_size, model.kv_heads * model.head_size
    of_target = sizes.length * (4 * model.n_embd * query + 4 * source.length * query)
    return float(sizes.strategy.micro_batch * (of_target + source.length * 4 * model.n_embd * kv))


def stack_start_cost(sizes: Sizes) -> LayerCost:
    """Return the cost of what a stack makes once for all of its layers in a stage: relative biases and masks."""
    model = sizes.model
    if model.position_embedding != "relative":
        return LayerCost(0, 0, 0, 0, 0, 0, NO_WORK, NO_WORK, NO_WORK, 0.0)
    heads = sizes.heads // sizes.strategy.context
    square = sizes.length**2
    bias = heads * square * sizes.itemsize
    work = elementwise(8 * square + 3 * bias, 6)
    numbers = 8 * square  # of the buckets, int64
    return LayerCost(sizes.heads * model.relative_buckets, 0, numbers, 0, 0, bias, work, work, NO_WORK, 0.0)


def encoder_norm_cost(sizes: Sizes) -> LayerCost:
    """Return the cost of the norm at the encoder's end."""
    norm = sizes.norm_parameters()
    saved = sizes.stream + saved_by_norm(sizes)
    if sizes.model.embd_pdrop > 0:
        saved += sizes.own_tokens * sizes.width
    forward, backward = elementwise(sizes.passes * 2 * sizes.stream), elementwise(sizes.passes * 3 * sizes.stream, 2)
    return LayerCost(norm, norm if sizes.sequence_parallel else 0, saved, 0, 0, 0, forward, backward, NO_WORK, 0.0)


def balanced_encoder_flops(config: Config) -> float:
    """Return the forward FLOPs of a block of the encoder for a sample, by which layers are divided into stages."""
    return encoder_block_cost(config, Strategy()).model_flops


def balanced_decoder_flops(config: Config) -> float:
    """Return the same for a block of the decoder; self-attention counts up to the diagonal."""
    model = config.model
    masked = 2 * model.n_positions**2 * model.n_head * model.head_size
    return decoder_block_cost(config, Strategy()).model_flops - masked
