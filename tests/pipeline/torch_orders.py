"""torch.distributed.pipelining's orders, printed as ours are: `2F5` is the forward of micro-batch 5 on stage 2."""

from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from megagpt.pipeline.plan import Action, Kind, Plan


def torch_order(name: str, ranks: int, micro_batches: int, chunks: int = 1) -> list[list[str]]:
    """What torch's schedule `name` computes, by rank."""
    return [
        [str(op) for op in order if op is not None and op.computation_type.value in "FBIW"]
        for order in get_schedule_ops(name, ranks, micro_batches, chunks)
    ]


def torch_plan(name: str, ranks: int, micro_batches: int, chunks: int = 2) -> Plan:
    """A plan of that order: from an independent maker."""
    orders = [
        tuple(
            Action(Kind(op.computation_type.value), op.stage_index, op.microbatch_index)
            for op in order
            if op is not None and op.computation_type.value in "FBIW"
        )
        for order in get_schedule_ops(name, ranks, micro_batches, chunks)
    ]
    owner = {action.stage: rank for rank, order in enumerate(orders) for action in order}
    return Plan(tuple(orders), tuple(owner[stage] for stage in sorted(owner)), len(owner), micro_batches)


def printed(plan: Plan) -> list[list[str]]:
    """Our order in the same letters."""
    return [[str(action) for action in order] for order in plan.actions]
