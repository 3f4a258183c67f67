"""Sizes of a layer's tensors on one rank, and the record of what a layer costs. Does not import torch."""

from dataclasses import dataclass

from megagpt.config.schema import Config, ModelConfig
from megagpt.planner.strategy import Strategy
from megagpt.planner.work import Work

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
    """Bytes that exist from forward to backward without being saved tensors: the output layer's weight gradient, which its
    forward computes, and what recomputed layers read beside their inputs."""
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

    def __add__(self, other: "LayerCost") -> "LayerCost":
        return LayerCost(
            self.parameters + other.parameters,
            self.partial + other.partial,
            self.saved + other.saved,
            self.held + other.held,
            self.deferred + other.deferred,
            max(self.working, other.working),
            self.forward + other.forward,
            self.input_backward + other.input_backward,
            self.weight_backward + other.weight_backward,
            self.model_flops + other.model_flops,
        )


class Sizes:
    """Sizes of tensors on one rank."""

    def __init__(self, config: Config, strategy: Strategy, length: int | None = None) -> None:
        """`length`: tokens of a sequence; `model.n_positions` if absent."""
        model = config.model
        self.model, self.strategy = model, strategy
        self.itemsize = ITEMSIZE[config.training.weight_precision]
        self.tensor = t = strategy.tensor
        self.sequence_parallel = strategy.sequence_parallel and t > 1
        self.length = length or model.n_positions
        self.tokens = strategy.micro_batch * self.length // strategy.context
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


def has_vectors(model: ModelConfig) -> bool:
    return model.position_embedding == "relative_vectors"


def is_explicit(model: ModelConfig, compiled: bool) -> bool:
    """Return whether attention scores exist in memory: with dropout, and without a GPU also with caps, biases and sinks."""
    biased = model.position_embedding in ("alibi", "relative")
    other = model.attention_softcap is not None or model.attention_sinks or biased
    return model.attn_pdrop > 0 or has_vectors(model) or (other and not compiled)


def norms_of_block(model: ModelConfig) -> int:
    """Return the number of norms over the residual stream in a block."""
    if model.norm_placement == "both":
        return 4
    return 1 if model.parallel_branches == "one_norm" else 2


def eager_norm_bytes(sizes: Sizes) -> int:
    """Return the bytes of statistics that torch's LayerNorm, or RMSNorm, saves for each normalised vector."""
    return 2 * sizes.itemsize if sizes.model.norm == "layernorm" else 4


def saved_by_norm(sizes: Sizes) -> int:
    """Return the bytes that a norm saves beside its input and its output, which are counted where they are used."""
    if sizes.compiled:
        return 0
    statistics = eager_norm_bytes(sizes) * sizes.own_tokens
    if sizes.model.norm == "layernorm":
        return statistics
    # torch's RMSNorm saves its input and its result in fp32; an input of 16 bits is then not saved itself.
    fp32 = 4 * sizes.own_tokens * sizes.width
    return statistics + (2 * fp32 - sizes.stream if sizes.itemsize == 2 else fp32)


def own_kv(sizes: Sizes) -> int:
    """Return the bytes of the keys of this rank's heads."""
    model = sizes.model
    if sizes.kv_split == sizes.tensor:
        return sizes.tokens * sizes.kv * sizes.itemsize
    group = model.n_head // model.kv_heads
    heads = max(1, sizes.heads // group) if sizes.heads % group == 0 or group % sizes.heads == 0 else sizes.heads
    return sizes.tokens * heads * model.head_size * sizes.itemsize


def exchanged_kv(sizes: Sizes) -> int:
    """Return the bytes of a context rank's keys after the exchange: repeated if their heads cannot be split."""
    heads = own_kv(sizes) // (sizes.tokens * sizes.model.head_size * sizes.itemsize)
    if heads % sizes.strategy.context:
        return sizes.tokens * sizes.query * sizes.itemsize
    return own_kv(sizes)
