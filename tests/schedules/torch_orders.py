"""Schedules of torch.distributed.pipelining, for comparison. `2F5` is the forward of micro-batch 5 on stage 2."""

from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from megagpt.schedules.plan import Action, ActionKind, Plan


def torch_order(name: str, ranks: int, micro_batches: int, chunks: int = 1) -> list[list[str]]:
    """Return the action list of each rank in torch's schedule `name`, as text."""
    return [
        [str(op) for op in order if op is not None and op.computation_type.value in "FBIW"]
        for order in get_schedule_ops(name, ranks, micro_batches, chunks)
    ]


def torch_plan(name: str, ranks: int, micro_batches: int, chunks: int = 2) -> Plan:
    """Return torch's schedule `name` as a plan: an independent implementation."""
    orders = [
        tuple(
            Action(ActionKind(op.computation_type.value), op.stage_index, op.microbatch_index)
            for op in order
            if op is not None and op.computation_type.value in "FBIW"
        )
        for order in get_schedule_ops(name, ranks, micro_batches, chunks)
    ]
    owner = {action.stage: rank for rank, order in enumerate(orders) for action in order}
    return Plan(tuple(orders), tuple(owner[stage] for stage in sorted(owner)), len(owner), micro_batches)


def printed(plan: Plan) -> list[list[str]]:
    """Return the action list of each rank of our plan, as text."""
    return [[str(action) for action in order] for order in plan.actions]
