"""How a run is divided over the GPUs: the keys of a config that change its speed and memory, but not its result."""

from dataclasses import dataclass
from functools import cached_property

from megagpt.config.rules import data_parallel_size
from megagpt.config.schema import Config
from megagpt.schedules.registry import chunks_per_rank


@dataclass(frozen=True)
class Strategy:
    """The layout of a run, its schedule, ZeRO stage, micro-batch and recomputation."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 1
    micro_batch: int = 1
    """Sequences in one micro-batch."""
    micro_batches: int = 1
    """Micro-batches of one data-parallel rank in a step."""
    recompute: str = "none"
    recompute_layers: int = 1
    compiled: bool = True
    """Whether the functions between matrix products are compiled, as on a GPU."""

    @classmethod
    def of(cls, config: Config, gpus: int, compiled: bool | None = None) -> "Strategy":
        """Return the strategy of a config on `gpus` GPUs. `compiled`: None for what a GPU does under the config.

        Raises ConfigError, with the numbers that fit, if the layout does not fit `gpus`. The schedule may be "auto".
        """
        parallel, training = config.parallel, config.training
        data = data_parallel_size(config, gpus)
        if compiled is None:
            compiled = config.zero.stage < 3 if training.compile == "auto" else training.compile
        return cls(
            parallel.tensor,
            parallel.pipeline,
            parallel.context,
            data,
            parallel.schedule,
            parallel.virtual_stages,
            parallel.sequence_parallel,
            config.zero.stage,
            training.micro_batch_size,
            training.global_batch_size // training.micro_batch_size // data,
            training.recompute,
            training.recompute_layers,
            compiled,
        )

    def apply(self, config: Config) -> Config:
        """Return the config with this strategy. The number of GPUs, which it has no key for, stays the user's."""
        parallel = {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "context": self.context,
            "schedule": self.schedule,
            "virtual_stages": self.virtual_stages,
            "sequence_parallel": self.sequence_parallel,
        }
        training = {
            "micro_batch_size": self.micro_batch,
            "recompute": self.recompute,
            "recompute_layers": self.recompute_layers,
        }
        return config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update=parallel),
                "zero": config.zero.model_copy(update={"stage": self.zero_stage}),
                "training": config.training.model_copy(update=training),
            }
        )

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def shards(self) -> int:
        """Ranks that hold the same parameters, over which ZeRO divides its states."""
        return self.data * self.context

    @cached_property
    def chunks(self) -> int:
        """Chunks of layers on each pipeline rank."""
        return chunks_per_rank(self.schedule, self.virtual_stages)

    @property
    def stages(self) -> int:
        """Pipeline stages of the model."""
        return self.pipeline * self.chunks

    def __str__(self) -> str:
        parts = [f"tensor {self.tensor}{' with sequence parallelism' if self.sequence_parallel else ''}"]
        parts += [f"pipeline {self.pipeline}"] if self.pipeline > 1 else []
        parts += [f"context {self.context}"] if self.context > 1 else []
        parts += [f"data {self.data}"]
        text = " x ".join(parts)
        if self.pipeline > 1:
            text += f", {self.schedule}" + (f" with {self.virtual_stages} virtual stages" if self.virtual_stages > 1 else "")
        return f"{text}, ZeRO-{self.zero_stage}, micro-batch {self.micro_batch}, recompute {self.recompute}"
