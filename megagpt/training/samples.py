"""Texts from fixed prompts during training, under every layout: each new token is a forward as in the evaluation.

There is no cache: the layout of a run keeps keys and values of all positions on no rank. So a token costs a forward of all
prompts, with their new tokens; every data-parallel replica computes the same.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.config.schema import Config
from megagpt.data.tokenizer import Tokenizer, load_tokenizer
from megagpt.engine.engine import Engine
from megagpt.labels import IGNORED
from megagpt.model.forward_context import MicroBatch
from megagpt.parallel.collectives import gather_sequence
from megagpt.parallel.context_parallel import ContextParallel
from megagpt.parallel.topology import Coordinates, Topology
from megagpt.parallel.vocab_loss import VocabParallelLoss


class _Inputs(NamedTuple):
    """What the model reads for each prompt, and writes after."""

    tokens: list[list[int]]
    """The beginning of the decoder's input."""
    source: Tensor | None = None
    """Input of an encoder, [prompts, encoder positions]."""
    source_lengths: Tensor | None = None
    """[prompts]"""


def _continued(config: Config, tokenizer: Tokenizer) -> _Inputs:
    """Return the prompts as texts that are continued: their ends, which leave room for the new tokens."""
    room = config.model.n_positions - config.evaluation.sample_tokens
    encoded = [tokenizer.encode(prompt) or [tokenizer.eod_id] for prompt in config.evaluation.sample_prompts]
    return _Inputs([ids[-room:] for ids in encoded])


def _answered(config: Config, tokenizer: Tokenizer) -> _Inputs:
    """Return the prompts as sources, for which the decoder writes targets."""
    model = config.model
    sources = [
        [*tokenizer.encode(prompt)[: model.source_length - 1], tokenizer.eod_id] for prompt in config.evaluation.sample_prompts
    ]
    padded = torch.zeros(len(sources), model.source_length, dtype=torch.int64)
    for row, source in zip(padded, sources, strict=True):
        row[: len(source)] = torch.tensor(source)
    return _Inputs([[model.decoder_start]] * len(sources), padded, torch.tensor([len(source) for source in sources]))


class SampleTexts:
    """Continues evaluation.sample_prompts by their most likely tokens; with an encoder, writes targets for them."""

    def __init__(self, engine: Engine) -> None:
        """Raises DataError if the tokenizer cannot be loaded."""
        config = engine.config
        assert config.data.tokenizer is not None, "a rule of the config requires it"
        self._engine = engine
        self._tokenizer = load_tokenizer(config.data.tokenizer)
        self._n_new = config.evaluation.sample_tokens
        self._inputs = (_answered if config.model.encoder_layers else _continued)(config, self._tokenizer)
        layout = engine.topology.layout
        ranges = layout.context * (layout.tensor if config.parallel.sequence_parallel else 1)
        longest = max(map(len, self._inputs.tokens)) + self._n_new
        self._length = min(config.model.n_positions, -(-longest // ranges) * ranges)

    @torch.no_grad()
    def texts(self) -> list[dict[str, Any]]:
        """Return each prompt with its new text. Collective."""
        prompt_ids, device = self._inputs.tokens, self._engine.device
        lengths = torch.tensor([len(ids) for ids in prompt_ids], device=device)
        rows = torch.arange(len(lengths), device=device)
        tokens = torch.zeros(len(lengths), self._length, dtype=torch.int64, device=device)
        for row, ids in enumerate(prompt_ids):
            tokens[row, : len(ids)] = torch.tensor(ids)
        for number in range(self._n_new):
            tokens[rows, lengths + number] = self._next_tokens(tokens, lengths + number - 1)
        prompts = self._engine.config.evaluation.sample_prompts
        return [
            {"prompt": prompt, "text": self._text(ids, row[len(ids) : len(ids) + self._n_new].tolist())}
            for prompt, ids, row in zip(prompts, prompt_ids, tokens, strict=True)
        ]

    def _next_tokens(self, tokens: Tensor, last: Tensor) -> Tensor:
        """Return the most likely tokens after the positions `last`, [rows]; tokens: [rows, length]."""
        engine, topology = self._engine, self._engine.topology
        context = ContextParallel(topology.context_group, topology.cp_rank, topology.layout.context)
        local, source, source_lengths = context.local_positions(tokens), self._inputs.source, self._inputs.source_lengths
        micro_batch = MicroBatch(
            local,
            torch.full_like(local, IGNORED),
            source=None if source is None else context.local_positions(source).to(engine.device),
            source_lengths=None if source_lengths is None else source_lengths.to(engine.device),
        )
        objective = _MostLikely(topology, last, min(self._tokenizer.vocab_size, engine.config.model.tokens_in_vocab))
        with engine.computing(objective):
            engine.evaluate([micro_batch])
        if topology.world_group is not None:
            source_rank = topology.layout.rank(Coordinates(pipeline=engine.last_stage_rank))
            dist.broadcast(objective.tokens, source_rank, group=topology.world_group)
        return objective.tokens

    def _text(self, before: list[int], new: list[int]) -> str:
        """Return the text of new tokens, up to the end of the document. `before`: the tokens before them."""
        new = new[: new.index(self._tokenizer.eod_id)] if self._tokenizer.eod_id in new else new
        if self._inputs.source is not None:
            return self._tokenizer.decode(new)
        shorter, longer = (self._tokenizer.decode([*before, *part]) for part in ([], new))
        return longer[len(shorter) :] if longer.startswith(shorter) else self._tokenizer.decode(new)


class _MostLikely:
    """In place of a loss: the most likely token at one position of each row."""

    def __init__(self, topology: Topology, last: Tensor, n_tokens: int) -> None:
        """`last`: the positions, [rows]; `n_tokens`: only ids below it."""
        self.tokens = torch.zeros_like(last)
        self._topology = topology
        self._last = last
        self._n_tokens = n_tokens

    def __call__(self, output: VocabParallelLoss, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        if output.parallel.sequence_parallel:
            hidden = gather_sequence(hidden, output.parallel.tp_group)
        hidden = gather_sequence(hidden, self._topology.context_group)
        rows = torch.arange(len(self._last), device=hidden.device)
        logits = output.full_logits(hidden[rows, self._last])
        self.tokens = logits[:, : self._n_tokens].argmax(-1)
        return torch.zeros((), device=hidden.device)
