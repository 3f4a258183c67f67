"""A transformer of an encoder and a decoder (T5, Raffel et al., arXiv 1910.10683), cut into chunks as `gpt.py` cuts GPT.

The layers of the encoder come first. Until the encoder's end a chunk hands on the hidden states of the source. From there on it
hands on the encoder's output unchanged and the hidden states of the decoder, so that every decoder chunk can attend to the
encoder; the gradient of the encoder's output comes back as the sum over the decoder's chunks.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from megagpt.config.schema import Config
from megagpt.model.adapters import add_adapters
from megagpt.model.block import PreNormBlock
from megagpt.model.ends import TOKEN_EMBEDDING, build_embedding, build_output, scaled_output
from megagpt.model.forward_context import MicroBatch
from megagpt.model.memory_cache import MemoryCache
from megagpt.model.objectives import build_objective
from megagpt.model.stacks import DecoderStack, EncoderStack
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import mark_second_copy

Stream = Tensor | tuple[Tensor, Tensor]
"""Hidden states of the source; from the encoder's end on its output, with the hidden states of the decoder once they exist."""


class EncoderDecoderChunk(nn.Module):
    """Layers `layers` of encoder and decoder, counted from the encoder's first.

    The first chunk of each stack also holds the token embedding, the encoder's last chunk its final norm, and the decoder's
    last chunk the final norm, the output layer and the loss.
    """

    def __init__(self, config: Config, parallel: ParallelContext, layers: range) -> None:
        super().__init__()
        model, n_encoder = config.model, config.model.encoder_layers
        self.config = config
        self.parallel = parallel
        self.is_first = layers.start == 0
        self.is_last = layers.stop == model.n_blocks
        if self.is_first or n_encoder in layers:
            self.tokens = build_embedding(TOKEN_EMBEDDING, config, parallel)
            if not self.is_first:
                mark_second_copy(self.tokens.weight)
        own = range(layers.start, min(layers.stop, n_encoder))
        self.encoder = EncoderStack(config, parallel, own) if own else None
        own = range(max(layers.start - n_encoder, 0), layers.stop - n_encoder)
        self.decoder = DecoderStack(config, parallel, own) if own else None
        add_adapters(self, config.lora)
        if self.is_last:
            self.objective = build_objective(config)
            self.loss = build_output(config, parallel, getattr(self, "tokens", None))

    def forward(self, x: Stream | None, micro_batch: MicroBatch) -> Stream:
        """Run this chunk.

        x: what the previous chunk returned; None on the first chunk. Hidden states are [batch, seq, hidden].
        Returns the hidden states for the next chunk, or on the last one the sum of the losses (fp32 scalar).
        """
        memory, hidden = x if isinstance(x, tuple) else (x, None)
        if self.encoder is not None:
            assert micro_batch.source is not None, "the data of a model with an encoder has sources"
            inputs = self._embed(micro_batch.source) if memory is None else memory
            memory = self.encoder(inputs, micro_batch)
        assert memory is not None
        if self.decoder is None:
            return memory
        inputs = self._embed(micro_batch.tokens) if hidden is None else hidden
        hidden = self.decoder(inputs, memory, micro_batch)
        if not self.is_last:
            return memory, hidden
        return self.objective(self.loss, scaled_output(hidden, self.config.model), micro_batch)

    @property
    def blocks(self) -> list[PreNormBlock]:
        """The blocks of this chunk, in the order of their forwards."""
        encoder = [] if self.encoder is None else self.encoder.blocks
        return [*encoder, *([] if self.decoder is None else self.decoder.blocks)]

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the encoder's output, for a model in one chunk. [batch, encoder seq] -> [batch, encoder seq, hidden]"""
        assert self.encoder is not None
        out: Tensor = self.encoder(self._embed(source), MicroBatch(source, source, source=source, source_lengths=lengths))
        return out

    def logits(self, source: Tensor, tokens: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Return next-token logits, for a model in one chunk. [batch, encoder seq], [batch, seq] -> [batch, seq, vocab_size]"""
        assert self.decoder is not None
        micro_batch = MicroBatch(tokens, tokens, source=source, source_lengths=source_lengths)
        hidden = self.decoder(self._embed(tokens), self.encode(source, source_lengths), micro_batch)
        return self.loss.full_logits(scaled_output(hidden, self.config.model))

    def next_token_logits(
        self, tokens: Tensor, first: int, memory: Tensor, source_lengths: Tensor | None, caches: Mapping[int, MemoryCache]
    ) -> Tensor:
        """Return the logits after the last token of each row, and store keys and values. For a model in one chunk.

        tokens: new tokens of each row, [rows, new], -> [rows, vocab_size]; `first`: position of the first one.
        """
        assert self.decoder is not None
        hidden = self.decoder.continued(self._embed(tokens), first, memory, source_lengths, caches)
        return self.loss.full_logits(scaled_output(hidden[:, -1], self.config.model))

    def layer_flops(self) -> list[int]:
        """Return the forward FLOPs of each layer for one sample."""
        source, length = self.config.model.source_length, self.config.model.n_positions
        encoder = [] if self.encoder is None else [source * block.flops_per_token(source) for block in self.encoder.blocks]
        decoder = [] if self.decoder is None else [block.flops(source, length) for block in self.decoder.blocks]
        return encoder + decoder

    def embedding_flops(self) -> int:
        """Return the forward FLOPs of the encoder's embeddings for one sample."""
        assert self.encoder is not None
        return self.config.model.source_length * self.encoder.positions.flops_per_token()

    def hidden_core_flops(self) -> int:
        """Return the forward FLOPs of one sample that the masks of attention save."""
        length, blocks = self.config.model.n_positions, [] if self.decoder is None else self.decoder.blocks
        return sum(length * block.attention.hidden_core_flops_per_token(length) for block in blocks)

    def _embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.tokens(tokens)
        scale = self.config.model.embedding_scale
        return x if scale == 1 else x * scale
