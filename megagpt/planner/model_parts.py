"""The parts of a model and where they stand: which of them a pipeline stage has, and what each costs. Does not import torch."""

from collections.abc import Hashable
from typing import NamedTuple, Protocol

from megagpt.config.schema import Config
from megagpt.planner.ends import embedding_cost, output_cost
from megagpt.planner.layer_sizes import LayerCost, Sizes
from megagpt.planner.layers import balanced_flops, block_cost
from megagpt.planner.stack_layers import (
    balanced_decoder_flops,
    balanced_encoder_flops,
    decoder_block_cost,
    encoder_block_cost,
    encoder_norm_cost,
    source_sizes,
    stack_start_cost,
)
from megagpt.planner.strategy import Strategy

Kind = Hashable
"""Parts of one kind have the same cost."""
EMBEDDING, OUTPUT = "embedding", "output"


class Kept(NamedTuple):
    """Bytes that the blocks of a stage keep together from forward to backward."""

    saved: int
    """Saved tensors: inputs of recomputed groups, tables, the encoder's output."""
    held: int = 0
    """Others, which recomputed layers read."""


class ModelParts(Protocol):
    """A model: its blocks, and what stands before, between and after them."""

    blocks: list[Kind]
    """Of each layer; those of an encoder come first."""
    block_flops: list[float]
    """Forward FLOPs of each layer, by which they are divided into stages."""
    first_flops: float
    """Those of the first stage's embeddings, in the same unit."""
    last_flops: float
    """Those of the output layer."""
    core_flops: float
    """Forward FLOPs of attention scores and weighted values of a sample, as a full square."""

    def costs(self, strategy: Strategy) -> dict[Kind, LayerCost]:
        """Return the cost of each kind. The output layer is counted without its own weight."""

    def of_stage(self, layers: range) -> list[Kind]:
        """Return the parts of a stage, in the order of the forward."""

    def embedding_places(self, layers: range) -> int:
        """Return how often the token embedding stands in a stage."""

    def shared_biases(self, layers: range) -> dict[str, Kind]:
        """Return the relative biases that stages share: their names, and the part that has their parameters."""

    def messages(self, strategy: Strategy, layers: range) -> tuple[int, ...]:
        """Return the bytes of the tensors that a stage hands to the next one."""

    def kept(self, strategy: Strategy, layers: range) -> Kept:
        """Return what the blocks of a stage keep together."""


class DecoderOnly:
    """A model without an encoder. Blocks with the same attention window are alike."""

    def __init__(self, config: Config) -> None:
        model = config.model
        self._config = config
        windows = [model.window_of(layer) for layer in range(model.n_layer)]
        self.blocks: list[Kind] = [("block", window) for window in windows]
        self._windows = dict(zip(self.blocks, windows, strict=True))
        flops = {kind: balanced_flops(config, window) for kind, window in self._windows.items()}
        self.block_flops = [flops[kind] for kind in self.blocks]
        self.first_flops = float(model.n_embd) if model.position_embedding == "learned" else 0.0
        self.last_flops = float(2 * model.padded_vocab_size * model.n_embd)
        attended = sum(min(window or model.n_positions, model.n_positions) for window in windows)
        self.core_flops = float(4 * attended * model.n_head * model.head_size * model.n_positions)

    def costs(self, strategy: Strategy) -> dict[Kind, LayerCost]:
        """Return the cost of each kind."""
        config = self._config
        blocks: dict[Kind, LayerCost] = {kind: block_cost(config, strategy, window) for kind, window in self._windows.items()}
        return {EMBEDDING: embedding_cost(config, strategy), **blocks, OUTPUT: output_cost(config, strategy)}

    def of_stage(self, layers: range) -> list[Kind]:
        """Return the parts of a stage."""
        first: list[Kind] = [EMBEDDING] if layers.start == 0 else []
        last: list[Kind] = [OUTPUT] if layers.stop == len(self.blocks) else []
        return [*first, *(self.blocks[layer] for layer in layers), *last]

    def embedding_places(self, layers: range) -> int:
        """Return 1 for the first stage."""
        return int(layers.start == 0)

    def shared_biases(self, layers: range) -> dict[str, Kind]:
        """Return nothing: each layer has its own."""
        return {}

    def messages(self, strategy: Strategy, layers: range) -> tuple[int, ...]:
        """Return the bytes of the hidden states."""
        return (Sizes(self._config, strategy).stream,)

    def kept(self, strategy: Strategy, layers: range) -> Kept:
        """Return what the blocks of a stage keep together."""
        return Kept(_saved_of_stack(Sizes(self._config, strategy), len(layers)))


class EncoderDecoder:
    """A model with an encoder, whose layers come first."""

    def __init__(self, config: Config) -> None:
        model = config.model
        self._config = config
        self._n_encoder = model.encoder_layers
        self.blocks: list[Kind] = [*["encoder block"] * model.encoder_layers, *["decoder block"] * model.n_layer]
        flops = {"encoder block": balanced_encoder_flops(config), "decoder block": balanced_decoder_flops(config)}
        self.block_flops = [flops[str(kind)] for kind in self.blocks]
        source, target = model.source_length, model.n_positions
        self.first_flops = float(source * model.n_embd) if model.position_embedding == "learned" else 0.0
        self.last_flops = float(target * 2 * model.padded_vocab_size * model.n_embd)
        pairs = model.encoder_layers * source**2 + model.n_layer * (target**2 + target * source)
        self.core_flops = float(4 * pairs * model.n_head * model.head_size)

    def costs(self, strategy: Strategy) -> dict[Kind, LayerCost]:
        """Return the cost of each kind."""
        config, source, target = self._config, source_sizes(self._config, strategy), Sizes(self._config, strategy)
        return {
            EMBEDDING: embedding_cost(config, strategy, source.length),
            "encoder start": stack_start_cost(source),
            "encoder block": encoder_block_cost(config, strategy),
            "encoder norm": encoder_norm_cost(source),
            "decoder embedding": embedding_cost(config, strategy),
            "decoder start": stack_start_cost(target),
            "decoder block": decoder_block_cost(config, strategy),
            OUTPUT: output_cost(config, strategy),
        }

    def of_stage(self, layers: range) -> list[Kind]:
        """Return the parts of a stage."""
        n_encoder, parts = self._n_encoder, list[Kind]()
        if layers.start < n_encoder:
            parts += [EMBEDDING] if layers.start == 0 else []
            parts += ["encoder start", *self.blocks[layers.start : min(layers.stop, n_encoder)]]
            parts += ["encoder norm"] if layers.stop >= n_encoder else []
        if layers.stop > n_encoder:
            parts += ["decoder embedding"] if layers.start <= n_encoder else []
            parts += ["decoder start", *self.blocks[max(layers.start, n_encoder) : layers.stop]]
            parts += [OUTPUT] if layers.stop == len(self.blocks) else []
        return parts

    def embedding_places(self, layers: range) -> int:
        """Return how many of the two stacks begin in a stage."""
        return (layers.start == 0) + (self._n_encoder in layers)

    def shared_biases(self, layers: range) -> dict[str, Kind]:
        """Return the relative biases of the stacks in a stage."""
        if self._config.model.position_embedding != "relative":
            return {}
        encoder = {"encoder bias": "encoder start"} if layers.start < self._n_encoder else {}
        return {**encoder, **({"decoder bias": "decoder start"} if layers.stop > self._n_encoder else {})}

    def messages(self, strategy: Strategy, layers: range) -> tuple[int, ...]:
        """Return the bytes of the hidden states of the source; behind the encoder its output and the decoder's."""
        source = source_sizes(self._config, strategy).stream
        return (source,) if layers.stop <= self._n_encoder else (source, Sizes(self._config, strategy).stream)

    def kept(self, strategy: Strategy, layers: range) -> Kept:
        """Return what the blocks of a stage keep together."""
        source, target = source_sizes(self._config, strategy), Sizes(self._config, strategy)
        n_encoder = max(0, min(layers.stop, self._n_encoder) - layers.start)
        n_decoder = len(layers) - n_encoder
        saved = held = 0
        mask = strategy.micro_batch * source.length * source.itemsize
        if n_encoder:
            saved += _saved_of_stack(source, n_encoder)
            held += _added_scores(source, strategy.micro_batch) or mask
        if n_decoder:
            saved += _saved_of_stack(target, n_decoder)
            held += _added_scores(target, 1) or target.length**2 * target.itemsize
            memory = source.stream + mask
            if strategy.recompute == "full":
                held += memory
            else:
                saved += memory
        if strategy.recompute != "none":
            return Kept(saved, held)
        is_biased = self._config.model.position_embedding == "relative"
        return Kept(saved + (0 if is_biased and not strategy.compiled else held))


PARTS: dict[bool, type[DecoderOnly] | type[EncoderDecoder]] = {False: DecoderOnly, True: EncoderDecoder}
"""Whether a model has an encoder -> its parts."""


def model_parts(config: Config) -> ModelParts:
    """Return the parts of the model. `model.vocab_size` must be known."""
    return PARTS[config.model.encoder_layers > 0](config)


def _added_scores(sizes: Sizes, samples: int) -> int:
    """Return the bytes of what a stack adds to the scores of all of its layers, with a relative bias; 0 without one."""
    if sizes.model.position_embedding != "relative":
        return 0
    return samples * sizes.heads // sizes.strategy.context * sizes.length**2 * sizes.itemsize


def _saved_of_stack(sizes: Sizes, layers: int) -> int:
    """Return the bytes that consecutive blocks save together: inputs of recomputed groups, or rotary tables."""
    strategy, model = sizes.strategy, sizes.model
    if strategy.recompute == "full":
        return -(-layers // strategy.recompute_layers) * sizes.stream
    if model.position_embedding == "rotary":
        return 2 * sizes.length * (int(model.head_size * model.rotary.fraction) // 2) * sizes.itemsize
    return 0
