"""Number of parameters, counted on the modules of a model on the meta device."""

import math
import re
from collections import Counter
from collections.abc import Container

from megagpt.config.schema import Config
from megagpt.model.meta_model import meta_model
from megagpt.parallel.parameter import shard_of


def parameters_by_group(config: Config) -> dict[str, int]:
    """Return the parameters of each group of modules, vocabulary padding excluded. `model.vocab_size` must be known.

    A group is a name without the layer number and the last part: "attention.qkv", "mlp.up", "embedding.token". Those of an
    encoder begin with "encoder".
    """
    counts: Counter[str] = Counter()
    for parameter in meta_model(config).parameters():
        shard = shard_of(parameter)
        group = re.sub(r"(^|\.)layers\.\d+\.", r"\1", shard.name).rpartition(".")[0]
        counts[group] += math.prod(shard.shape)
    return dict(counts)


def parameter_count(config: Config, names: Container[str] | None = None) -> int:
    """Return the number of parameters of the model, or of those named, vocabulary padding excluded."""
    shards = [shard_of(parameter) for parameter in meta_model(config).parameters()]
    return sum(math.prod(shard.shape) for shard in shards if names is None or shard.name in names)
