"""What one layer costs on one rank, in closed form: parameters, saved activations, operations and collectives.

The modules in megagpt/model/ define all of it; tests compare these formulas with dry runs of the modules, for every file in
configs/. A new kind of layer is one function that returns a `LayerCost`. Does not import torch.
"""

from dataclasses import dataclass, replace

from megagpt.config.schema import Config, ModelConfig
from megagpt.planner.strategy import Strategy
from megagpt.planner.work import Call, Overlap, Work, elementwise, product, weight_gradient

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a weight or an activation, by `training.weight_precision`."""
LOSS_CHUNK_MIB = {True: 1024, False: 32}
"""Default memory of the logits that exist at a time, on a GPU and on a CPU; megagpt/parallel/embedding.py has the same."""
EAGER_PASSES = 4.0
"""Bytes that functions between matrix products move when they are not compiled, in multiples of those of the compiled ones."""
EXPLICIT_PASSES = (12.0, 16.0)
"""Times that attention whose scores exist in memory reads or writes them: forward, and backward. Counted for the scores before
the diagonal; a fused kernel over all of them, as Megatron-LM had in 2021, makes half as many passes over twice as many."""


@dataclass(frozen=True)
class LayerCost:
    """One layer, or the embedding or the output layer, on one rank and for one micro-batch."""

    parameters: int
    """Numbers in the rank's weights, vocabulary padding included."""
    partial: int
    """Those whose gradients are summed over the tensor ranks after the last micro-batch."""
    saved: int
    """Bytes that the forward saves for the backward."""
    held: int
    """Bytes of weight gradients that the forward computes and the backward adds; the output layer has them."""
    deferred: int
    """Bytes that delayed weight gradients need after the backward of the inputs: the layers' inputs and outputs' gradients."""
    working: int
    """Bytes of the largest temporary tensors that exist at the same time, roughly."""
    forward: Work
    input_backward: Work
    weight_backward: Work
    model_flops: float
    """Forward FLOPs of the unsharded layer for the micro-batch's tokens, as MFU counts them: attention as a full square."""

    @property
    def backward(self) -> Work:
        """The full backward."""
        return self.input_backward + self.weight_backward


class _Sizes:
    """Sizes of tensors on one rank."""

    def __init__(self, config: Config, strategy: Strategy) -> None:
        model = config.model
        self.model, self.strategy = model, strategy
        self.itemsize = ITEMSIZE[config.training.weight_precision]
        self.tensor = t = strategy.tensor
        self.sequence_parallel = strategy.sequence_parallel and t > 1
        self.length = model.n_positions
        self.tokens = strategy.micro_batch * model.n_positions // strategy.context
        """Tokens of a micro-batch on this context rank."""
        self.own_tokens = self.tokens // t if self.sequence_parallel else self.tokens
        """Tokens whose residual stream this rank has."""
        self.width = model.n_embd
        self.heads = model.n_head // t
        self.query = model.n_head * model.head_size // t
        """Width of this rank's queries."""
        self.kv_split = t if model.kv_heads % t == 0 else 1
        self.kv = model.kv_heads * model.head_size // self.kv_split
        """Width of the keys that this rank computes."""
        self.grouped = model.kv_heads != model.n_head
        self.inner = model.ffn_hidden_size // t
        self.parts = 2 if model.gated_mlp else 1
        self.narrow = config.training.precision == "fp8"
        """Whether the blocks' products, but for the weight gradients, have factors of 8 bits."""
        self.compiled = strategy.compiled
        self.passes = 1.0 if strategy.compiled else EAGER_PASSES

    @property
    def stream(self) -> int:
        """Bytes of this rank's part of the residual stream."""
        return self.own_tokens * self.width * self.itemsize

    def columns(self) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of the column-parallel layers of a block, attention's before the MLP's."""
        up = (self.width, self.parts * self.inner)
        if not self.grouped:
            return [(self.width, 3 * self.query), up]
        return [(self.width, self.query), (self.width, 2 * self.kv), up]

    def rows(self) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of the row-parallel layers."""
        return [(self.query, self.width), (self.inner, self.width)]

    def norm_parameters(self) -> int:
        """Return the weights of one norm over the residual stream."""
        return self.width * (2 if self.model.norm == "layernorm" else 1)


def block_cost(config: Config, strategy: Strategy, window: int | None = None) -> LayerCost:
    """Return the cost of a decoder block. `window`: attended tokens, None for all earlier ones."""
    sizes = _Sizes(config, strategy)
    parameters, partial = _block_parameters(sizes)
    attended = min(window or sizes.length, sizes.length)
    inside = _inside_block(sizes, strategy.recompute == "selective")
    full = strategy.recompute == "full"
    forward = _block_forward(sizes, attended)
    input_backward, weight_backward = _block_backward(sizes, attended)
    if strategy.recompute == "selective":
        input_backward += _core(sizes, attended, backward=False)
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


def _deferred(sizes: _Sizes) -> int:
    inputs = (1 if sizes.model.parallel_branches == "one_norm" else 2) * sizes.stream
    inputs += sizes.tokens * (sizes.query + sizes.inner) * sizes.itemsize
    gradients = sum(n_out for _, n_out in sizes.columns() + sizes.rows())
    return inputs + sizes.tokens * gradients * sizes.itemsize


def _model_flops(sizes: _Sizes, attended: int) -> float:
    """Return the forward FLOPs of a block for the tokens of a micro-batch, unsharded."""
    model = sizes.model
    query, kv = model.n_head * model.head_size, model.kv_heads * model.head_size
    weights = sizes.width * (2 * query + 2 * kv) + sizes.width * model.ffn_hidden_size * (1 + sizes.parts)
    distances = 4 * (model.relative_max_distance + 1) * query if _has_vectors(model) else 0
    return float(sizes.strategy.micro_batch * sizes.length * (2 * weights + 4 * attended * query + distances))


def balanced_flops(config: Config, window: int | None) -> float:
    """Return the forward FLOPs of a block for one token, by which layers are divided into stages; attention up to the diagonal.

    As `flops_per_token` of the modules in megagpt/model/ has it.
    """
    sizes = _Sizes(config, Strategy())
    unmasked = 4 * min(window or sizes.length, sizes.length) * sizes.query
    masked = unmasked * min(window or sizes.length, sizes.length) // (2 * sizes.length)
    full_square = _model_flops(sizes, min(window or sizes.length, sizes.length)) / sizes.length
    return full_square - masked


def _has_vectors(model: ModelConfig) -> bool:
    return model.position_embedding == "relative_vectors"


def is_explicit(model: ModelConfig, compiled: bool) -> bool:
    """Return whether attention scores exist in memory: with dropout, and without a GPU also with caps, biases and sinks."""
    biased = model.position_embedding in ("alibi", "relative")
    other = model.attention_softcap is not None or model.attention_sinks or biased
    return model.attn_pdrop > 0 or _has_vectors(model) or (other and not compiled)


def norms_of_block(model: ModelConfig) -> int:
    """Return the number of norms over the residual stream in a block."""
    if model.norm_placement == "both":
        return 4
    return 1 if model.parallel_branches == "one_norm" else 2


def _block_parameters(sizes: _Sizes) -> tuple[int, int]:
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
    if model.position_embedding == "relative":
        split += sizes.heads * model.relative_buckets
    if _has_vectors(model):
        shared += 2 * (model.relative_max_distance + 1) * model.head_size
    if model.attention_sinks:
        split += sizes.heads
    own_heads = shared
    if sizes.kv_split != t:
        own_heads += sizes.width * 2 * sizes.kv + model.qkv_bias * 2 * sizes.kv
    partial = (row_biases + norms if sizes.sequence_parallel else 0) + (own_heads if t > 1 else 0)
    return matrices + column_biases + row_biases + norms + split + shared, partial


def _eager_norm_bytes(sizes: _Sizes) -> int:
    """Return the bytes of statistics that torch's LayerNorm, or RMSNorm, saves for each normalised vector."""
    return 2 * sizes.itemsize if sizes.model.norm == "layernorm" else 4


def _saved_by_norm(sizes: _Sizes) -> int:
    """Return the bytes that a norm saves beside its input and its output, which are counted where they are used."""
    if sizes.compiled:
        return 0
    statistics = _eager_norm_bytes(sizes) * sizes.own_tokens
    if sizes.model.norm == "layernorm":
        return statistics
    # torch's RMSNorm saves its input and its result in fp32; an input of 16 bits is then not saved itself.
    fp32 = 4 * sizes.own_tokens * sizes.width
    return statistics + (2 * fp32 - sizes.stream if sizes.itemsize == 2 else fp32)


def _inside_block(sizes: _Sizes, selective: bool) -> int:
    """Return the bytes that a block saves when it is not recomputed, the input of the block included."""
    model, e, stream = sizes.model, sizes.itemsize, sizes.stream
    after, before = model.norm_placement != "before", model.norm_placement != "after"
    # Inputs of norms and of column-parallel layers: the residual stream at two points, and the outputs of norms.
    streams = 2 + (2 if before else 0) + (2 if after else 0)
    if model.parallel_branches != "no":
        streams = 2 if model.parallel_branches == "one_norm" else 3
    total = streams * stream + norms_of_block(model) * _saved_by_norm(sizes)
    total += _saved_by_attention(sizes, selective)
    total += (sizes.parts + 1 + (model.gated_mlp and not sizes.compiled)) * sizes.tokens * sizes.inner * e
    if model.resid_pdrop > 0:
        is_fused = sizes.compiled and before and not after and model.parallel_branches == "no"
        total += 2 * (8 * sizes.own_tokens if is_fused else sizes.own_tokens * sizes.width)
    return total


def _saved_by_attention(sizes: _Sizes, selective: bool) -> int:
    """Return the bytes that attention saves: queries, keys and values in all their forms, statistics and its output."""
    model = sizes.model
    query, kv = (sizes.tokens * width * sizes.itemsize for width in (sizes.query, sizes.kv))
    own_kv, rotary, normed = _own_kv(sizes), model.position_embedding == "rotary", model.qk_norm
    total = _saved_by_core(sizes, selective)
    if sizes.kv_split != sizes.tensor:  # the numbers of the heads that are taken from all keys and values
        total += 16 * own_kv // (sizes.tokens * model.head_size * sizes.itemsize)
    if normed == "width":  # in fp32
        total += (8 if sizes.itemsize == 2 else 4) * sizes.tokens * (sizes.query + sizes.kv) + 8 * sizes.tokens
    if normed == "head":
        total += query + 2 * kv
        if not sizes.compiled:
            total += _eager_norm_bytes(sizes) * sizes.tokens * (sizes.heads + sizes.kv // model.head_size)
            if model.norm != "layernorm":  # see `_saved_by_norm`
                fp32 = 4 * sizes.tokens * (sizes.query + sizes.kv)
                total += 2 * fp32 - query if sizes.itemsize == 2 else fp32
    if sizes.strategy.context > 1:
        exchanged = _exchanged_kv(sizes)  # queries, keys and values are parts of one tensor
        copies = query + exchanged if rotary else query * (exchanged != query)
        return total + query + 2 * exchanged + copies
    copied = rotary or normed != "none"
    if copied:
        total += query + own_kv
    if normed == "head":
        return total
    if not sizes.grouped:
        return total + 3 * query
    return total + (2 * kv if sizes.kv_split == sizes.tensor else own_kv) + (0 if copied else query)


def _own_kv(sizes: _Sizes) -> int:
    """Return the bytes of the keys of this rank's heads."""
    model = sizes.model
    if sizes.kv_split == sizes.tensor:
        return sizes.tokens * sizes.kv * sizes.itemsize
    group = model.n_head // model.kv_heads
    heads = max(1, sizes.heads // group) if sizes.heads % group == 0 or group % sizes.heads == 0 else sizes.heads
    return sizes.tokens * heads * model.head_size * sizes.itemsize


def _exchanged_kv(sizes: _Sizes) -> int:
    """Return the bytes of a context rank's keys after the exchange: repeated if their heads cannot be split."""
    heads = _own_kv(sizes) // (sizes.tokens * sizes.model.head_size * sizes.itemsize)
    if heads % sizes.strategy.context:
        return sizes.tokens * sizes.query * sizes.itemsize
    return _own_kv(sizes)


def _saved_by_core(sizes: _Sizes, selective: bool) -> int:
    model, e, tokens = sizes.model, sizes.itemsize, sizes.tokens
    out = tokens * sizes.query * e
    if selective:
        return out
    if is_explicit(model, sizes.compiled):
        scores = sizes.heads * tokens * (sizes.length + 256) // 2
        return out + scores * (2 * e + (e + 1 if model.attn_pdrop > 0 else 0))
    statistics = 4 * sizes.heads * tokens
    moved_out = model.position_embedding == "rotary" or model.qk_norm != "none" or sizes.strategy.context > 1
    return out + statistics + (out if moved_out else 0)


def _core(sizes: _Sizes, attended: int, backward: bool) -> Work:
    """Return the work of attention scores and weighted values, which only count up to the diagonal."""
    seen = attended - attended * attended / (2 * sizes.length) if attended < sizes.length else attended / 2
    flops = 4 * seen * sizes.query * sizes.tokens
    operands = sizes.tokens * (2 * sizes.query + 2 * sizes.kv) * sizes.itemsize
    if is_explicit(sizes.model, sizes.compiled):
        scores = sizes.itemsize * sizes.heads * sizes.tokens * seen
        passes = EXPLICIT_PASSES[backward]
        times = 2 if backward else 1
        return Work(flops=times * flops, loaded=times * operands, moved=passes * scores, kernels=8)
    # The backward computes the scores again: five products instead of two (Dao et al., arXiv 2205.14135).
    if backward:
        return Work(core_flops=2.5 * flops, loaded=3 * operands, kernels=2)
    return Work(core_flops=flops, loaded=operands, kernels=1)


def _block_forward(sizes: _Sizes, attended: int) -> Work:
    e, model = sizes.itemsize, sizes.model
    work = Work()
    for n_in, n_out in sizes.columns() + sizes.rows():
        work += product(sizes.tokens, n_in, n_out, e, sizes.narrow)
    work += _core(sizes, attended, backward=False)
    streams = 2 * norms_of_block(model) + 5  # norms read and write; two residual additions
    work += elementwise(sizes.passes * streams * sizes.stream, 3)
    work += elementwise(sizes.passes * (sizes.parts + 1) * sizes.tokens * sizes.inner * e)
    if model.position_embedding == "rotary":
        work += elementwise(sizes.passes * 2 * sizes.tokens * (sizes.query + sizes.kv) * e, 2)
    return work + Work(calls=_forward_calls(sizes)) + _context_calls(sizes)


def _forward_calls(sizes: _Sizes) -> tuple[Call, ...]:
    if sizes.tensor == 1:
        return ()
    size = sizes.tokens * sizes.width * sizes.itemsize
    sums: tuple[Call, ...] = (Call("tensor", "reduce-scatter" if sizes.sequence_parallel else "all-reduce", size, 2),)
    if sizes.sequence_parallel:
        sums += (Call("tensor", "all-gather", size, len(sizes.columns())),)
    return sums + _width_norm_calls(sizes)


def _width_norm_calls(sizes: _Sizes) -> tuple[Call, ...]:
    if sizes.model.qk_norm != "width" or sizes.tensor == 1:
        return ()
    return (Call("tensor", "all-reduce", 4 * sizes.tokens, 2 if sizes.kv_split == sizes.tensor else 1),)


def _context_calls(sizes: _Sizes) -> Work:
    """Return the two exchanges of attention, which the backward makes in reverse."""
    if sizes.strategy.context == 1:
        return Work()
    query = sizes.tokens * sizes.query * sizes.itemsize
    inputs = query + 2 * _exchanged_kv(sizes)
    calls = (Call("context", "all-to-all", inputs), Call("context", "all-to-all", query))
    return Work(moved=3 * (inputs + query), kernels=6, calls=calls)


def _block_backward(sizes: _Sizes, attended: int) -> tuple[Work, Work]:
    """Return the backward of the inputs and that of the weights."""
    e, model, tokens = sizes.itemsize, sizes.model, sizes.tokens
    size = tokens * sizes.width * e
    inputs, weights = _core(sizes, attended, backward=True), Work()
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


def _repeated(forward: Work, sizes: _Sizes) -> Work:
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


def embedding_cost(config: Config, strategy: Strategy) -> LayerCost:
    """Return the cost of the embeddings at the start of the first stage."""
    sizes = _Sizes(config, strategy)
    model, e = sizes.model, sizes.itemsize
    entries = model.padded_vocab_size // sizes.tensor
    positions = model.n_positions * sizes.width if model.position_embedding == "learned" else 0
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
    sizes = _Sizes(config, strategy)
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
    return LayerCost(
        norm,
        norm if sizes.sequence_parallel else 0,
        sizes.stream + _saved_by_norm(sizes) + size,
        4 * entries * sizes.width,
        4 * entries * sizes.width,
        -(-tokens // chunks) * entries * e,
        forward,
        backward,
        elementwise(12 * entries * sizes.width),
        float(strategy.micro_batch * model.n_positions * 2 * model.padded_vocab_size * sizes.width),
    )
