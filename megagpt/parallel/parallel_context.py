"""What a parallel layer needs to know about this rank: one record, built once by the engine."""

from dataclasses import dataclass, field

from torch.distributed import ProcessGroup

from megagpt.parallel.context_parallel import ContextParallel
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.kernels import Kernels
from megagpt.parallel.products import PlainProducts, Products
from megagpt.parallel.topology import Topology


@dataclass(frozen=True)
class ParallelContext:
    """Tensor and context parallelism of this rank, the queue for weight gradients, and how small kernels run.

    The default is a single process.
    """

    deferred_gradients: DeferredGradients = field(default_factory=DeferredGradients)
    tp_group: ProcessGroup | None = None
    """Tensor-parallel group; None for one rank."""
    tp_rank: int = 0
    tp_size: int = 1
    sequence_parallel: bool = False
    """Split the sequence over the tensor ranks outside of the matrix products."""
    context: ContextParallel = field(default_factory=ContextParallel)
    """Context-parallel group, independent of the tensor group."""
    kernels: Kernels = field(default_factory=Kernels)
    """Runs memory-bound functions, compiled or eagerly."""
    products: Products = field(default_factory=PlainProducts)
    """How the linear layers of the blocks multiply."""

    @property
    def range_index(self) -> int:
        """Index of this rank's range of positions outside of attention.

        Sequence parallelism splits the range of a context rank further, over the tensor ranks.
        """
        return self.context.rank * self.tp_size + self.tp_rank if self.sequence_parallel else self.context.rank

    @classmethod
    def of(
        cls,
        topology: Topology,
        sequence_parallel: bool,
        deferred_gradients: DeferredGradients,
        kernels: Kernels | None = None,
        products: Products | None = None,
    ) -> "ParallelContext":
        """Return the context of this rank in `topology`."""
        return cls(
            deferred_gradients=deferred_gradients,
            tp_group=topology.tensor_group,
            tp_rank=topology.tp_rank,
            tp_size=topology.layout.tensor,
            sequence_parallel=sequence_parallel,
            context=ContextParallel(topology.context_group, topology.cp_rank, topology.layout.context),
            kernels=kernels or Kernels(),
            products=products or PlainProducts(),
        )
