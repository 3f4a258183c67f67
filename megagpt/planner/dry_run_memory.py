"""Memory of a rank by a dry run of its modules, for models that the closed formulas do not cover: those with an encoder."""

from megagpt.config.schema import Config
from megagpt.parallel.topology import Layout
from megagpt.planner.dry_run import open_dry_run
from megagpt.planner.memory import MemoryEstimate, estimate
from megagpt.planner.step_simulation import Held, peaks_in_flight
from megagpt.planner.strategy import Strategy


def largest_rank_memory(config: Config, strategy: Strategy) -> MemoryEstimate:
    """Return the memory of the pipeline rank that needs most; see `memory_by_rank`."""
    return max(memory_by_rank(config, strategy), key=lambda memory: memory.total)


def memory_by_rank(config: Config, strategy: Strategy) -> list[MemoryEstimate]:
    """Return the memory of each pipeline rank, without temporary tensors and most buffers.

    No process group may exist. `parallel.schedule` must not be "auto".
    """
    layout = Layout(strategy.tensor, strategy.pipeline, strategy.context, strategy.data)
    saved: dict[int, int] = {}
    n_parameters = []
    for rank in layout.ranks_along(0, "pipeline"):
        with open_dry_run(config, layout, rank, strategy.compiled) as dry_run:
            n_parameters.append(dry_run.n_parameters)
            saved |= {stage: dry_run.saved_bytes(stage) for stage in dry_run.chunks}
    held = [Held(saved[stage], saved[stage]) for stage in sorted(saved)]
    peaks = peaks_in_flight(strategy.schedule, strategy.virtual_stages, strategy.pipeline, strategy.micro_batches, held)
    ranks = zip(n_parameters, peaks, strict=True)
    return [estimate(config, strategy, number, peak, 0, 0) for number, peak in ranks]
