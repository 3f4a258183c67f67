"""Pipeline stages of a run: which layers each has, and the cost of one micro-batch on it. Does not import torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megagpt.config.schema import Config
from megagpt.pipeline.partition import balance
from megagpt.planner.layers import LayerCost, balanced_flops, block_cost, embedding_cost, output_cost
from megagpt.planner.step_simulation import Held
from megagpt.planner.strategy import Strategy


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage has, for one rank and micro-batch."""

    layers: range
    costs: tuple[LayerCost, ...]
    """Of the embedding, the blocks and the output layer, as far as the stage has them."""
    parameters: int
    """Of this stage's rank; a tied output layer that has its own copy is included."""
    tied: int
    """Those of the token embedding if the first and the last stage share it."""
    saved: int
    """Bytes that a micro-batch in flight keeps on the rank."""
    deferred: int
    """Bytes that it keeps for delayed weight gradients."""

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
        model = config.model
        self._windows = [model.window_of(layer) for layer in range(model.n_layer)]
        self._flops = [balanced_flops(config, window) for window in self._windows]
        self._first = float(model.n_embd) if model.position_embedding == "learned" else 0.0
        self._last = float(2 * model.padded_vocab_size * model.n_embd)
        self._split = lru_cache(None)(self._balance)
        self._costs = lru_cache(None)(self._layer_costs)

    def split(self, n_stages: int) -> tuple[range, ...]:
        """Return the layers of each stage, as the modules divide them (`megagpt/model/meta_model.py`)."""
        return self._split(n_stages)

    @property
    def window_counts(self) -> dict[int | None, int]:
        """Number of layers with each attention window."""
        return dict(Counter(self._windows))

    def costs(self, strategy: Strategy) -> tuple[LayerCost, LayerCost, dict[int | None, LayerCost]]:
        """Return the costs of embedding, output layer, and blocks by their window."""
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
        embedding, output, blocks = self.costs(strategy)
        n_stages, config = strategy.stages, self._config
        stages = []
        for index, layers in enumerate(self.split(n_stages)):
            own = [blocks[self._windows[layer]] for layer in layers]
            first, last = index == 0, index == n_stages - 1
            costs = ([embedding] if first else []) + own + ([output] if last else [])
            tied = config.model.tie_embeddings and n_stages > 1 and (first or last)
            saved = sum(cost.saved + cost.held for cost in costs) + self.shared_bytes(strategy, len(layers))
            parameters = sum(cost.parameters for cost in costs)
            head = config.model.padded_vocab_size // strategy.tensor * config.model.n_embd
            if last and (not config.model.tie_embeddings or not first):
                parameters += head
            deferred = sum(cost.deferred for cost in costs)
            stages.append(Stage(layers, tuple(costs), parameters, head if tied else 0, saved, deferred))
        return stages

    def shared_bytes(self, strategy: Strategy, layers: int) -> int:
        """Return the bytes that the blocks of a stage save together: inputs of recomputed groups, rotary tables."""
        config = self._config
        model, itemsize = config.model, 4 if config.training.weight_precision == "fp32" else 2
        if strategy.recompute == "full":
            ranks = strategy.context * (strategy.tensor if strategy.sequence_parallel else 1)
            stream = strategy.micro_batch * model.n_positions // ranks * model.n_embd * itemsize
            return -(-layers // strategy.recompute_layers) * stream
        if model.position_embedding == "rotary":
            rotated = int(model.head_size * model.rotary.fraction) // 2
            return 2 * model.n_positions * rotated * itemsize
        return 0

    def _balance(self, n_stages: int) -> tuple[range, ...]:
        return tuple(balance(self._flops, n_stages, self._first, self._last))

    def _layer_costs(self, strategy: Strategy) -> tuple[LayerCost, LayerCost, dict[int | None, LayerCost]]:
        blocks = {window: block_cost(self._config, strategy, window) for window in dict.fromkeys(self._windows)}
        return embedding_cost(self._config, strategy), output_cost(self._config, strategy), blocks


def stages_of_rank(ranks_of_stages: Sequence[int], rank: int) -> list[int]:
    """Return the stages of a pipeline rank."""
    return [stage for stage, owner in enumerate(ranks_of_stages) if owner == rank]
