"""Texts from fixed prompts during training, under every layout: each new token is a forward as in the evaluation.

There is no cache: the layout of a run keeps keys and values of all positions on no rank. So a token costs a forward of all
prompts, with their new tokens; every data-parallel replica computes the same.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.data.tokenizer import load_tokenizer
from megagpt.engine.engine import Engine
from megagpt.labels import IGNORED
from megagpt.model.forward_context import MicroBatch
from megagpt.parallel.collectives import gather_sequence
from megagpt.parallel.context_parallel import ContextParallel
from megagpt.parallel.embedding import VocabParallelLoss
from megagpt.parallel.topology import Coordinates, Topology


class SampleTexts:
    """Continues evaluation.sample_prompts by their most likely tokens."""

    def __init__(self, engine: Engine) -> None:
        """Raises DataError if the tokenizer cannot be loaded."""
        config = engine.config
        assert config.data.tokenizer is not None, "a rule of the config requires it"
        self._engine = engine
        self._tokenizer = load_tokenizer(config.data.tokenizer)
        self._n_new = config.evaluation.sample_tokens
        room = config.model.n_positions - self._n_new
        encoded = [self._tokenizer.encode(prompt) or [self._tokenizer.eod_id] for prompt in config.evaluation.sample_prompts]
        self._prompts = [ids[-room:] for ids in encoded]
        layout = engine.topology.layout
        ranges = layout.context * (layout.tensor if config.parallel.sequence_parallel else 1)
        longest = max(map(len, self._prompts)) + self._n_new
        self._length = min(config.model.n_positions, -(-longest // ranges) * ranges)

    @torch.no_grad()
    def texts(self) -> list[dict[str, Any]]:
        """Return each prompt with its new text. Collective."""
        lengths = torch.tensor([len(prompt) for prompt in self._prompts], device=self._engine.device)
        rows = torch.arange(len(lengths), device=self._engine.device)
        tokens = torch.zeros(len(lengths), self._length, dtype=torch.int64, device=self._engine.device)
        for row, prompt in enumerate(self._prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        for number in range(self._n_new):
            tokens[rows, lengths + number] = self._next_tokens(tokens, lengths + number - 1)
        return [
            {"prompt": prompt, "text": self._text(tokens[row, : len(ids) + self._n_new].tolist(), len(ids))}
            for row, (prompt, ids) in enumerate(zip(self._engine.config.evaluation.sample_prompts, self._prompts, strict=True))
        ]

    def _next_tokens(self, tokens: Tensor, last: Tensor) -> Tensor:
        """Return the most likely tokens after the positions `last`, [rows]; tokens: [rows, length]."""
        engine, topology = self._engine, self._engine.topology
        context = ContextParallel(topology.context_group, topology.cp_rank, topology.layout.context)
        local = context.local_positions(tokens)
        micro_batch = MicroBatch(local, torch.full_like(local, IGNORED))
        objective = _MostLikely(topology, last, min(self._tokenizer.vocab_size, engine.config.model.tokens_in_vocab))
        with engine.computing(objective):
            engine.evaluate([micro_batch])
        if topology.world_group is not None:
            source = topology.layout.rank(Coordinates(pipeline=engine.last_stage_rank))
            dist.broadcast(objective.tokens, source, group=topology.world_group)
        return objective.tokens

    def _text(self, ids: list[int], n_prompt: int) -> str:
        """Return the text after the prompt, up to the end of the document."""
        new = ids[n_prompt:]
        new = new[: new.index(self._tokenizer.eod_id)] if self._tokenizer.eod_id in new else new
        before, both = (self._tokenizer.decode([*ids[:n_prompt], *part]) for part in ([], new))
        return both[len(before) :] if both.startswith(before) else self._tokenizer.decode(new)


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
