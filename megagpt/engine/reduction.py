"""When gradients are summed over the replicas and updated weights gathered: in buckets of blocks, beside other blocks.

A backward goes through the blocks from the last to the first, so the sums of the later blocks can run beside the backward of
the earlier ones. What is in no bucket (the first blocks, embeddings, norms at the ends) is summed when the chunk is done.
After the optimizer step it is gathered first: the weights of a bucket arrive while the next forward computes what is before it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from megagpt.distributed.phase import PhaseTracker
from megagpt.engine.deepspeed_internals import ZeroSteps
from megagpt.engine.gradient_sync import GradientSync


class Bucket(NamedTuple):
    """Consecutive blocks whose gradients are summed together."""

    first: nn.Module
    """The block whose backward is the last of them."""
    parameters: list[nn.Parameter]


def make_buckets(blocks: Sequence[nn.Module], trained: Sequence[nn.Parameter], n_bytes: float) -> list[Bucket]:
    """Return the buckets in the order in which a backward completes them.

    Each has at least `n_bytes` of fp32 gradients. The first blocks, which end with the chunk itself, are in none.
    `trained`: parameters whose gradients are summed for this chunk.
    """
    allowed, buckets, parameters = set(trained), list[Bucket](), list[nn.Parameter]()
    for block in reversed(blocks[1:]):
        parameters += [parameter for parameter in block.parameters() if parameter in allowed]
        if 4 * sum(parameter.numel() for parameter in parameters) >= n_bytes:
            buckets.append(Bucket(block, parameters))
            parameters = []
    return buckets


class ChunkReduction:
    """Starts the sums of this rank's gradients while the executor runs."""

    def __init__(
        self,
        sync: GradientSync,
        chunks: Mapping[int, nn.Module],
        buckets: Mapping[int, Sequence[Bucket]],
        build_steps: Callable[[Sequence[Sequence[nn.Parameter]], Sequence[Sequence[nn.Parameter]]], ZeroSteps],
        phase: PhaseTracker,
    ) -> None:
        """`chunks`, `buckets`: those of this rank, by stage.

        `build_steps`: gets the parameters of the buckets in the order of a forward, and those of each stage in no bucket.
        """
        self._sync = sync
        self._buckets = buckets
        self._rest = {stage: _without(parameters, buckets[stage]) for stage, parameters in sync.by_stage.items()}
        self._waiting: dict[int, list[Bucket]] = {}
        self._phase = phase
        in_buckets = [bucket.parameters for stage in buckets.values() for bucket in reversed(stage)]
        self.zero = build_steps(in_buckets, list(self._rest.values()))
        for stage, chunk in chunks.items():
            self._wait_before(chunk, _without(list(chunk.parameters()), buckets[stage]))
            for bucket in buckets[stage]:
                self._wait_before(bucket.first, bucket.parameters)

    @contextmanager
    def during_backward_of(self, stage: int) -> Iterator[None]:
        """Inside the block, a forward of the stage runs whose backward is the last of the step and computes all gradients."""
        waiting = self._waiting[stage] = list(self._buckets[stage])
        handles = [bucket.first.register_forward_pre_hook(self._watch(bucket, waiting)) for bucket in waiting]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def stage_done(self, stage: int) -> None:
        """Start the remaining sums of a stage whose backwards are done. Collective."""
        self._phase.enter(f"gradient reduction of stage {stage}")
        with self._phase.waiting():
            for bucket in self._waiting.pop(stage, self._buckets[stage]):
                self._start(bucket.parameters)
            self._start(self._rest[stage])

    def wait_for_weights(self, parameters: Sequence[nn.Parameter] | None = None) -> None:
        """Wait until the updated weights of these parameters are here; of all parameters if None. Collective."""
        gathers = self.zero.take_gathers(parameters)
        if gathers:
            with self._phase.waiting():
                for gather in gathers:
                    gather.wait()

    def _wait_before(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Let each forward of the module begin with the weights of the last step."""
        module.register_forward_pre_hook(lambda module, arguments: self.wait_for_weights(parameters))

    def _watch(self, bucket: Bucket, waiting: list[Bucket]) -> Callable[..., None]:
        """Return a hook of a block's forward that starts the sums when the gradient of the block's input is complete.

        Autograd runs what was computed later first, so nothing of the block is left then. Behind frozen weights there is no
        such gradient, and the bucket waits for the end.
        """

        def start(gradient: Tensor) -> None:
            waiting.remove(bucket)
            self._start(bucket.parameters)

        def watch(block: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments[0].requires_grad:
                arguments[0].register_hook(start)

        return watch

    def _start(self, parameters: Sequence[nn.Parameter]) -> None:
        self._sync.sum(parameters)
        self.zero.reduce(parameters)


def _without(parameters: Sequence[nn.Parameter], buckets: Sequence[Bucket]) -> list[nn.Parameter]:
    in_buckets = {parameter for bucket in buckets for parameter in bucket.parameters}
    return [parameter for parameter in parameters if parameter not in in_buckets]
