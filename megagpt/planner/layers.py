"""What one layer costs on one rank, in closed form: parameters, saved activations, operations and collectives.

The modules in megagpt/model/ define all of it; tests compare these formulas with dry runs of the modules, for every file in
configs/. A new kind of layer is one function that returns a `LayerCost`. Does not import torch.
"""

from dataclasses import replace

from megagpt.config.schema import Config
from megagpt.planner.attention_core import Core, causal_core
from megagpt.planner.layer_sizes import (
    LayerCost,
    Sizes,
    eager_norm_bytes,
    exchanged_kv,
    has_vectors,
    norms_of_block,
    own_kv,
    saved_by_norm,
)
from megagpt.planner.strategy import Strategy
from megagpt.planner.work import Call, Overlap, Work, elementwise, product, weight_gradient


def block_cost(config: Config, strategy: Strategy, window: int | None = None) -> LayerCost:
    """Return the cost of a block of a decoder-only model. `window`: attended tokens, None for all earlier ones."""
    sizes = Sizes(config, strategy)
    attended = min(window or sizes.length, sizes.length)
    return self_attention_block(sizes, causal_core(sizes, attended), attended)


def self_attention_block(sizes: Sizes, core: Core, attended: int) -> LayerCost:
    """Return the cost of a block of self-attention and an MLP. `attended`: tokens that MFU counts for a query."""
    strategy = sizes.strategy
    parameters, partial = _block_parameters(sizes)
    inside = _inside_block(sizes, core)
    full = strategy.recompute == "full"
    forward = _block_forward(sizes, core)
    input_backward, weight_backward = _block_backward(sizes, core)
    if strategy.recompute == "selective":
        input_backward += core.forward
    elif full:
        input_backward += _repeated(forward, sizes)
    working = 2 * sizes.itemsize * sizes.tokens * sizes.inner * sizes.parts
    if full:
        working += inside * strategy.recompute_layers
    return LayerCost(
        parameters,
        partial,
        0 if full else inside,  # the input of a group is counted by the stage
        0,
        _deferred(sizes),
        working,
        forward,
        input_backward,
        weight_backward,
        _model_flops(sizes, attended),
    )


def _deferred(sizes: Sizes) -> int:
    inputs = (1 if sizes.model.parallel_branches == "one_norm" else 2) * sizes.stream
    inputs += sizes.tokens * (sizes.query + sizes.inner) * sizes.itemsize
    gradients = sum(n_out for _, n_out in sizes.columns() + sizes.rows())
    return inputs + sizes.tokens * gradients * sizes.itemsize


def _model_flops(sizes: Sizes, attended: int) -> float:
    """Return the forward FLOPs of a block for the tokens of a micro-batch, unsharded."""
    model = sizes.model
    query, kv = model.n_head * model.head_size, model.kv_heads * model.head_size
    weights = sizes.width * (2 * query + 2 * kv) + sizes.width * model.ffn_hidden_size * (1 + sizes.parts)
    distances = 4 * (model.relative_max_distance + 1) * query if has_vectors(model) else 0
    return float(sizes.strategy.micro_batch * sizes.length * (2 * weights + 4 * attended * query + distances))


def balanced_flops(config: Config, window: int | None) -> float:
    """Return the forward FLOPs of a block for one token, by which layers are divided into stages; attention up to the diagonal.

    As `flops_per_token` of the modules in megagpt/model/ has it.
    """
    sizes = Sizes(config, Strategy())
    unmasked = 4 * min(window or sizes.length, sizes.length) * sizes.query
    masked = unmasked * min(window or sizes.length, sizes.length) // (2 * sizes.length)
    full_square = _model_flops(sizes, min(window or sizes.length, sizes.length)) / sizes.length
    return full_square - masked


def _block_parameters(sizes: Sizes) -> tuple[int, int]:
    """Return the parameters of a block on this rank, and those with partial gradients."""
    model, t = sizes.model, sizes.tensor
    matrices = sum(n_in * n_out for n_in, n_out in sizes.columns() + sizes.rows())
    attention_outputs = sum(n_out for _, n_out in sizes.columns()[:-1])
    column_biases = model.qkv_bias * attention_outputs + model.mlp_bias * sizes.parts * sizes.inner
    row_biases = (model.attention_bias + model.mlp_bias) * sizes.width
    norms = norms_of_block(model) * sizes.norm_parameters()
    split, shared = 0, 0
    if model.qk_norm == "head":
        shared += 2 * model.head_size * (2 if model.norm == "layernorm" else 1)
    elif model.qk_norm == "width":
        split += sizes.query
        if sizes.kv_split == t:
            split += sizes.kv
        else:
            shared += sizes.kv
    if model.position_embedding == "relative" and not model.encoder_layers:  # with an encoder all layers share one
        split += sizes.heads * model.relative_buckets
    if has_vectors(model):
        shared += 2 * (model.relative_max_distance + 1) * model.head_size
    if model.attention_sinks:
        split += sizes.heads
    own_heads = shared
    if sizes.kv_split != t:
        own_heads += sizes.width * 2 * sizes.kv + model.qkv_bias * 2 * sizes.kv
    partial = (row_biases + norms if sizes.sequence_parallel else 0) + (own_heads if t > 1 else 0)
    return matrices + column_biases + row_biases + norms + split + shared, partial


def _inside_block(sizes: Sizes, core: Core) -> int:
    """Return the bytes that a block saves when it is not recomputed, the input of the block included."""
    model, e, stream = sizes.model, sizes.itemsize, sizes.stream
    after, before = model.norm_placement != "before", model.norm_placement != "after"
    # Inputs of norms and of column-parallel layers: the residual stream at two points, and the outputs of norms.
    streams = 2 + (2 if before else 0) + (2 if after else 0)
    if model.parallel_branches != "no":
        streams = 2 if model.parallel_branches == "one_norm" else 3
    total = streams * stream + norms_of_block(model) * saved_by_norm(sizes)
    total += _saved_by_attention(sizes, core)
    inner = sizes.parts + 1
    if not sizes.compiled:
        inner += model.gated_mlp - (model.activation == "relu" and not model.gated_mlp)  # relu saves its output only
    total += inner * sizes.tokens * sizes.inner * e
    if model.resid_pdrop > 0:
        is_fused = sizes.compiled and before and not after and model.parallel_branches == "no"
        total += 2 * (8 * sizes.own_tokens if is_fused else sizes.own_tokens * sizes.width)
    return total


def _saved_by_attention(sizes: Sizes, core: Core) -> int:
    """Return the bytes that attention saves: queries, keys and values in all their forms, statistics and its output."""
    model = sizes.model
    query, kv = (sizes.tokens * width * sizes.itemsize for width in (sizes.query, sizes.kv))
    keys, rotary, normed = own_kv(sizes), model.position_embedding == "rotary", model.qk_norm
    total = core.saved
    if sizes.kv_split != sizes.tensor:  # the numbers of the heads that are taken from all keys and values
        total += 16 * keys // (sizes.tokens * model.head_size * sizes.itemsize)
    if normed == "width":  # in fp32
        total += (8 if sizes.itemsize == 2 else 4) * sizes.tokens * (sizes.query + sizes.kv) + 8 * sizes.tokens
    if normed == "head":
        total += query + 2 * kv
        if not sizes.compiled:
            total += eager_norm_bytes(sizes) * sizes.tokens * (sizes.heads + sizes.kv // model.head_size)
            if model.norm != "layernorm":  # see `saved_by_norm`
                fp32 = 4 * sizes.tokens * (sizes.query + sizes.kv)
                total += 2 * fp32 - query if sizes.itemsize == 2 else fp32
    if sizes.strategy.context > 1:
        exchanged = exchanged_kv(sizes)  # queries, keys and values are parts of one tensor
        copies = query + exchanged if rotary else query * (exchanged != query)
        return total + query + 2 * exchanged + copies
    copied = rotary or normed != "none"
    if copied:
        total += query + keys
    if normed == "head":
        return total
    if not sizes.grouped:
        return total + 3 * query
    if sizes.kv_split == sizes.tensor:
        return total + 2 * kv + (0 if copied else query)
    return total + keys + (0 if copied else query + keys)


def _block_forward(sizes: Sizes, core: Core) -> Work:
    e, model = sizes.itemsize, sizes.model
    work = Work()
    for n_in, n_out in sizes.columns() + sizes.rows():
        work += product(sizes.tokens, n_in, n_out, e, sizes.narrow)
    work += core.forward
    streams = 2 * norms_of_block(model) + 5  # norms read and write; two residual additions
    work += elementwise(sizes.passes * streams * sizes.stream, 3)
    work += elementwise(sizes.passes * (sizes.parts + 1) * sizes.tokens * sizes.inner * e)
    if model.position_embedding == "rotary":
        work += elementwise(sizes.passes * 2 * sizes.tokens * (sizes.query + sizes.kv) * e, 2)
    return work + Work(calls=_forward_calls(sizes)) + _context_calls(sizes)


def _forward_calls(sizes: Sizes) -> tuple[Call, ...]:
    if sizes.tensor == 1:
        return ()
    size = sizes.tokens * sizes.width * sizes.itemsize
    sums: tuple[Call, ...] = (Call("tensor", "reduce-scatter" if sizes.sequence_parallel else "all-reduce", size, 2),)
    if sizes.sequence_parallel:
        sums += (Call("tensor", "all-gather", size, len(sizes.columns())),)
    return sums + _width_norm_calls(sizes)


def _width_norm_calls(sizes: Sizes) -> tuple[Call, ...]:
    if sizes.model.qk_norm != "width" or sizes.tensor == 1:
        return ()
    return (Call("tensor", "all-reduce", 4 * sizes.tokens, 2 if sizes.kv_split == sizes.tensor else 1),)


def _context_calls(sizes: Sizes) -> Work:
    """Return the two exchanges of attention, which the backward makes in reverse."""
    if sizes.strategy.context == 1:
        return Work()
    query = sizes.tokens * sizes.query * sizes.itemsize
    inputs = query + 2 * exchanged_kv(sizes)
    calls = (Call("context", "all-to-all", inputs), Call("context", "all-to-all", query))
    return Work(moved=3 * (inputs + query), kernels=6, calls=calls)


def _block_backward(sizes: Sizes, core: Core) -> tuple[Work, Work]:
    """Return the backward of the inputs and that of the weights."""
    e, model, tokens = sizes.itemsize, sizes.model, sizes.tokens
    size = tokens * sizes.width * e
    inputs, weights = core.backward, Work()
    for n_in, n_out in sizes.columns():
        grad_input, grad_weight = product(tokens, n_out, n_in, e, sizes.narrow), weight_gradient(tokens, n_in, n_out, e)
        inputs += grad_input
        weights += grad_weight
        if sizes.sequence_parallel:
            inputs += Work(overlaps=(Overlap(Call("tensor", "reduce-scatter", size), grad_weight),))
            weights += Work(overlaps=(Overlap(Call("tensor", "all-gather", size), grad_input),))
        elif sizes.tensor > 1:
            inputs += Work(overlaps=(Overlap(Call("tensor", "all-reduce", size), grad_weight),))
    for n_in, n_out in sizes.rows():
        inputs += product(tokens, n_out, n_in, e, sizes.narrow)
        weights += weight_gradient(tokens, n_in, n_out, e)
    if sizes.sequence_parallel:
        inputs += Work(calls=(Call("tensor", "all-gather", size, 2),))
    inputs += Work(calls=_width_norm_calls(sizes))
    streams = 3 * norms_of_block(model) + 4
    inputs += elementwise(sizes.passes * streams * sizes.stream, 4)
    inputs += elementwise(sizes.passes * (2 * sizes.parts + 1) * tokens * sizes.inner * e)
    inputs += elementwise(2 * tokens * (sizes.query + 2 * sizes.kv) * e)  # gradients of queries, keys and values are joined
    if model.position_embedding == "rotary":
        inputs += elementwise(sizes.passes * 2 * tokens * (sizes.query + sizes.kv) * e, 2)
    if model.qkv_bias or model.mlp_bias:
        weights += elementwise(tokens * (sizes.query + 2 * sizes.kv + sizes.parts * sizes.inner) * e, 4)
    return inputs + _context_calls(sizes), weights


def _repeated(forward: Work, sizes: Sizes) -> Work:
    """Return the forward that full recomputation repeats: it stops before the last sum of a group of layers."""
    model, layers = sizes.model, sizes.strategy.recompute_layers
    stops_early = model.norm_placement == "before" and model.resid_pdrop == 0 and model.parallel_branches == "no"
    if not stops_early:
        return forward
    kind = "reduce-scatter" if sizes.sequence_parallel else "all-reduce"
    calls = tuple(
        call._replace(times=call.times - 1 / layers) if call.kind == kind and call.bytes > 4 * sizes.tokens else call
        for call in forward.calls
    )
    return replace(forward, calls=calls)
