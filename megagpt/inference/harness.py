"""A model for EleutherAI's lm-evaluation-harness (package lm_eval), tensor and data parallel.

Texts are encoded, cut and scored as by the harness's own model for transformers ("hf"), so the scores of a checkpoint and of
its export are equal. Data-parallel ranks each get a share of a task's questions from the harness.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megagpt.data.chat_template import ChatTemplate
from megagpt.errors import ConfigError
from megagpt.inference.sampling import Sampling
from megagpt.inference.scoring import Window, score
from megagpt.inference.source import TrainedModel
from megagpt.model.kv_cache import PAGE_TOKENS
from megagpt.parallel.topology import Topology

DEFAULT_NEW_TOKENS = 256
"""Tokens of an answer if a task does not say, as in the harness."""
BATCH_SIZE = 16
"""Answers that are generated at a time."""


class HarnessModel(TemplateLM):
    """A model in memory."""

    def __init__(self, trained: TrainedModel, topology: Topology, template: ChatTemplate | None = None) -> None:
        """`template`: for tasks that are asked as a dialogue."""
        super().__init__()
        self._trained = trained
        self._template = template
        self._topology = topology
        self._rank, self._world_size = topology.dp_rank, topology.layout.data
        self._device = next(trained.model.parameters()).device
        self._positions = trained.config.model.n_positions

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._trained.tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the one that a Hugging Face tokenizer adds, or else `eot_token_id`."""
        return self._trained.before[0] if self._trained.before else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the harness's caches."""
        return self._trained.tokenizer_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **keys: Any) -> list[int]:
        """Return the tokens of a text, with those that the tokenizer adds before it unless the text begins with them.

        `add_special_tokens`: False adds none.
        """
        ids, before = self._trained.tokenizer.encode(string), list(self._trained.before)
        return ids if add_special_tokens is False or ids[: len(before)] == before else [*before, *ids]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return a name of the template for the harness's caches."""
        return "" if self._template is None else self.tokenizer_name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a dialogue."""
        if self._template is None:
            raise ConfigError("--apply-chat-template: the model's tokenizer has no chat template")
        return self._template.text(chat_history, add_generation_prompt)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text."""
        windows: list[Window] = []
        counts = []
        for request in requests:
            parts = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self._positions, context_len=1
                ),
            )
            added = [self._window(context, continuation) for context, continuation in parts]
            windows += added
            counts.append(len(added))
        logprobs = iter([result.logprob for result in score(self._trained.model, windows)])
        return [sum(next(logprobs) for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context up to a stop string."""
        generator = self._trained.generator(BATCH_SIZE * (self._positions + PAGE_TOKENS), BATCH_SIZE)
        added = []
        for request in requests:
            context, asked = request.args
            keys = dict(normalize_gen_kwargs(asked, DEFAULT_NEW_TOKENS))
            until = keys.get("until") or []
            sampling = _sampling(keys)
            room = self._positions - sampling.max_tokens
            if room < 1:
                raise ConfigError(
                    f"a task asks for answers of {sampling.max_tokens} tokens, and the model's context has {self._positions}; "
                    "set generation_kwargs.max_gen_toks of the task"
                )
            stop = [until] if isinstance(until, str) else list(until)
            stop = [text for text in stop if text]
            added.append((generator.add(self.tok_encode(context)[-room:], sampling, stop), stop))
        for _ in generator.run():
            pass
        return [self._answer([draw.token for draw in completion.draws], stop) for completion, stop in added]

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values of all data-parallel ranks."""
        group = self._topology.dp_cp_group
        if group is None:
            return tensor.reshape(1)
        parts = [torch.empty_like(tensor) for _ in range(self._world_size)]
        dist.all_gather(parts, tensor, group=group)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all data-parallel ranks on rank `dst`, None on others."""
        parts: list[Any] = [None] * self._world_size
        dist.all_gather_object(parts, obj, group=self._topology.dp_cp_group)
        return parts if self._rank == dst else None

    def barrier(self) -> None:
        """Wait for the other data-parallel ranks."""
        dist.barrier(group=self._topology.dp_cp_group)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **keys: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is the most likely one."""
        windows = [self._window(context, continuation) for _, context, continuation in requests]
        return [(result.logprob, result.is_greedy) for result in score(self._trained.model, windows)]

    def _answer(self, tokens: list[int], stop: Sequence[str]) -> str:
        """Return the text of an answer's tokens alone: some tokenizers leave out a space before the first one."""
        text = self._trained.tokenizer.decode(tokens)
        return text[: min([position for one in stop if (position := text.find(one)) >= 0], default=len(text))]

    def _window(self, context: list[int], continuation: list[int]) -> Window:
        """Return the last tokens that fit in the model's context."""
        return Window([*context, *continuation][-self._positions - 1 :], min(len(continuation), self._positions))


def _sampling(keys: dict[str, Any]) -> Sampling:
    """Return the sampling that the arguments of a task describe, by the names of transformers."""
    greedy = not keys.get("do_sample")
    return Sampling(
        max_tokens=int(keys["max_gen_toks"]),
        temperature=0.0 if greedy else float(keys.get("temperature", 1.0)),
        top_k=keys.get("top_k"),
        top_p=float(keys.get("top_p", 1.0)),
    )
