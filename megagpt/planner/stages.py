"""Pipeline stages of a run: which layers each has, and the cost of one micro-batch on it. Does not import torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megagpt.config.schema import Config
from megagpt.pipeline.partition import balance
from megagpt.planner.layer_sizes import LayerCost
from megagpt.planner.model_parts import Kept, Kind, model_parts
from megagpt.planner.step_simulation import Held
from megagpt.planner.strategy import Strategy


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage has, for one rank and micro-batch."""

    layers: range
    costs: tuple[LayerCost, ...]
    """Of the embeddings, the blocks and the output layer, as far as the stage has them."""
    blocks: tuple[int, ...]
    """Indices of the blocks in `costs`."""
    parameters: int
    """Of this stage's rank, copies of shared ones included."""
    shared: Mapping[str, int]
    """Those that several places of the model share, such as a tied embedding: name -> numbers."""
    saved: int
    """Bytes that a micro-batch in flight keeps on the rank."""
    held_beside: int
    """Those of them that are no saved tensors."""
    deferred: int
    """Bytes that it keeps for delayed weight gradients."""
    messages: tuple[int, ...]
    """Bytes of the tensors of a micro-batch that the stage hands to the next one."""

    @property
    def own_parameters(self) -> int:
        """Parameters without the shared ones."""
        return self.parameters - sum(self.shared.values())

    @property
    def held(self) -> Held:
        """What is kept of a micro-batch, in bytes."""
        return Held(self.saved, self.deferred)

    @property
    def partial(self) -> int:
        """Parameters whose gradients are summed over the tensor ranks."""
        return sum(cost.partial for cost in self.costs)

    @property
    def working(self) -> int:
        """Bytes of the largest temporary tensors."""
        return max(cost.working for cost in self.costs)


class StageModel:
    """Costs of the stages of one config. Layers that are alike are computed once."""

    def __init__(self, config: Config) -> None:
        """`model.vocab_size` must be known."""
        self._config = config
        self._parts = model_parts(config)
        self._split = lru_cache(None)(self._balance)
        self._costs = lru_cache(None)(self._parts.costs)

    def split(self, n_stages: int) -> tuple[range, ...]:
        """Return the layers of each stage, as the modules divide them (`megagpt/model/meta_model.py`)."""
        return self._split(n_stages)

    @property
    def block_counts(self) -> dict[Kind, int]:
        """Number of blocks of each kind."""
        return dict(Counter(self._parts.blocks))

    def block_counts_by_stage(self, n_stages: int) -> list[dict[Kind, int]]:
        """Return the number of blocks of each kind in each stage."""
        return [dict(Counter(self._parts.blocks[layer] for layer in layers)) for layers in self.split(n_stages)]

    @property
    def core_flops(self) -> float:
        """Forward FLOPs of attention scores and weighted values of a sample, as a full square."""
        return self._parts.core_flops

    def costs(self, strategy: Strategy) -> dict[Kind, LayerCost]:
        """Return the costs of the embeddings, the blocks and the output layer."""
        return self._costs(
            Strategy(
                tensor=strategy.tensor,
                context=strategy.context,
                sequence_parallel=strategy.sequence_parallel,
                micro_batch=strategy.micro_batch,
                recompute=strategy.recompute,
                recompute_layers=strategy.recompute_layers,
                compiled=strategy.compiled,
            )
        )

    def stages(self, strategy: Strategy) -> list[Stage]:
        """Return the stages, in order. The schedule must not be "auto"."""
        return [self._stage(strategy, layers) for layers in self.split(strategy.stages)]

    def kept(self, strategy: Strategy, layers: range) -> Kept:
        """Return what the blocks of a stage keep together of a micro-batch."""
        return self._parts.kept(strategy, layers)

    def _stage(self, strategy: Strategy, layers: range) -> Stage:
        parts, known = self._parts.of_stage(layers), self.costs(strategy)
        costs = tuple(known[kind] for kind in parts)
        shared, beside = self._shared(strategy, layers)
        kept = self.kept(strategy, layers)
        held = sum(cost.held for cost in costs) + kept.held
        return Stage(
            layers,
            costs,
            tuple(index for index, kind in enumerate(parts) if kind in self.block_counts),
            sum(cost.parameters for cost in costs) + beside,
            shared,
            sum(cost.saved for cost in costs) + kept.saved + held,
            held,
            sum(cost.deferred for cost in costs),
            self._parts.messages(strategy, layers),
        )

    def _shared(self, strategy: Strategy, layers: range) -> tuple[dict[str, int], int]:
        """Return the shared parameters of a stage, and the number of its parameters beyond those of its parts.

        Each stage has one copy of the token embedding, however often it uses it.
        """
        model, parts = self._config.model, self._parts
        size = model.padded_vocab_size // strategy.tensor * model.n_embd
        places, is_last = parts.embedding_places(layers), layers.stop == model.n_blocks
        has_tokens = places > 0 or (is_last and model.tie_embeddings)
        matrices = has_tokens + (is_last and not model.tie_embeddings)
        is_shared = has_tokens and (model.tie_embeddings or model.encoder_layers > 0)
        costs = self.costs(strategy)
        shared = {name: costs[kind].parameters for name, kind in parts.shared_biases(layers).items()}
        return {**({"token embedding": size} if is_shared else {}), **shared}, (matrices - places) * size

    def _balance(self, n_stages: int) -> tuple[range, ...]:
        parts = self._parts
        return tuple(balance(parts.block_flops, n_stages, parts.first_flops, parts.last_flops))


def stages_of_rank(ranks_of_stages: Sequence[int], rank: int) -> list[int]:
    """Return the stages of a pipeline rank."""
    return [stage for stage, owner in enumerate(ranks_of_stages) if owner == rank]
