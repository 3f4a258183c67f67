"""Draw a simulated plan as an SVG timeline: one row for each rank, one box for each action."""

import math
from collections.abc import Iterator
from xml.sax.saxutils import escape

from megagpt.schedules.plan import Action, ActionKind, Plan
from megagpt.schedules.simulate import Simulation

COLOURS = {
    ActionKind.FORWARD: "#2f6fb7",
    ActionKind.BACKWARD: "#3a9a68",
    ActionKind.BACKWARD_INPUT: "#d9822b",
    ActionKind.BACKWARD_WEIGHT: "#7c8894",
}
LABELS = {
    ActionKind.FORWARD: "forward",
    ActionKind.BACKWARD: "full backward",
    ActionKind.BACKWARD_INPUT: "input gradient",
    ActionKind.BACKWARD_WEIGHT: "weight gradients",
}
LEFT, TOP, WIDTH, RIGHT = 64, 48, 1080, 110
"""Pixels: left margin, top margin, width of the makespan, right margin."""
ROW, BOX, BELOW = 34, 28, 64
"""Pixels: height of a row, height of its boxes, bottom margin."""
STYLE = """text{font:12px Helvetica,Arial,sans-serif;fill:#24292f}
.title{font-size:15px;font-weight:bold}.side{fill:#57606a}.axis{fill:#8c959f;font-size:10px}
.n{font-size:10px;text-anchor:middle}.on-dark{fill:#fff}rect{stroke:#fff;stroke-width:.6}.idle{fill:#f0f2f4;stroke:none}"""


def draw(plan: Plan, simulation: Simulation, title: str) -> str:
    """Return the text of an SVG file that shows `simulation`, the timing of `plan`.

    The colour shows the kind of action, a lighter shade a later chunk of the rank, the number the micro-batch. A gap is idle
    time. On the right: each rank's idle share and its peak number of micro-batches in flight (a micro-batch counts fully
    if all chunks of the rank hold its activations).
    """
    width = LEFT + WIDTH + RIGHT
    height = TOP + ROW * plan.n_ranks + BELOW
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="100%" height="100%" fill="#fff"/><text class="title" x="{LEFT}" y="22">{escape(title)}</text>',
        f'<text class="side" x="{LEFT + WIDTH + 12}" y="{TOP - 8}">idle · in flight</text>',
    ]
    for rank in range(plan.n_ranks):
        lines += _row(plan, simulation, rank)
    lines += _axis(simulation.makespan, TOP + ROW * plan.n_ranks)
    lines += _legend(plan, height - 14)
    return "\n".join([*lines, "</svg>", ""])


def _row(plan: Plan, simulation: Simulation, rank: int) -> Iterator[str]:
    top = TOP + ROW * rank
    middle = top + BOX / 2 + 4
    in_flight = simulation.peak_activations[rank] / plan.chunks_per_rank
    yield f'<text class="side" x="{LEFT - 10}" y="{middle:g}" text-anchor="end">rank {rank}</text>'
    yield f'<rect class="idle" x="{LEFT}" y="{top}" width="{WIDTH}" height="{BOX}"/>'
    for action in plan.actions[rank]:
        yield _box(plan, simulation, action, top)
    yield f'<text x="{LEFT + WIDTH + 12}" y="{middle:g}">{simulation.idle_share[rank]:.1%} · {in_flight:.3g}</text>'


def _box(plan: Plan, simulation: Simulation, action: Action, top: int) -> str:
    scale = WIDTH / simulation.makespan
    start, end = simulation.start[action], simulation.end[action]
    x, width = LEFT + start * scale, (end - start) * scale
    stages = plan.stages_of(plan.rank_of_stage[action.stage])
    shade = stages.index(action.stage) / len(stages)
    tip = f"{LABELS[action.kind]} of micro-batch {action.micro_batch} on stage {action.stage}, {start:.4g} to {end:.4g}"
    number = ""
    if width >= 7 * len(str(action.micro_batch)):
        text_class = "n" if shade >= 0.4 else "n on-dark"
        number = f'<text class="{text_class}" x="{x + width / 2:.1f}" y="{top + BOX / 2 + 3.5:g}">{action.micro_batch}</text>'
    rect = f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{BOX}" fill="{_lighter(COLOURS[action.kind], shade)}"/>'
    return f"<g><title>{tip}</title>{rect}{number}</g>"


def _lighter(colour: str, white: float) -> str:
    """Return `colour` (#rrggbb) mixed with a share `white` of white."""
    channels = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(channel + (255 - channel) * white):02x}" for channel in channels)


def _axis(makespan: float, top: int) -> Iterator[str]:
    interval = next(size for size in _round_numbers(makespan) if makespan / size <= 12)
    for index in range(int(makespan / interval) + 1):
        x = LEFT + WIDTH * index * interval / makespan
        yield f'<text class="axis" x="{x:.1f}" y="{top + 10}" text-anchor="middle">{index * interval:.4g}</text>'


def _round_numbers(makespan: float) -> Iterator[float]:
    """Yield 1, 2, 5, 10, ... times a power of ten far below `makespan`."""
    power = 10.0 ** (math.floor(math.log10(makespan)) - 2)
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _legend(plan: Plan, y: int) -> Iterator[str]:
    kinds = [kind for kind in ActionKind if any(action.kind is kind for order in plan.actions for action in order)]
    chunks = plan.chunks_per_rank
    x = LEFT
    for kind in kinds:
        for chunk in range(chunks):
            fill = _lighter(COLOURS[kind], chunk / chunks)
            yield f'<rect x="{x + 16 * chunk}" y="{y - 11}" width="14" height="14" fill="{fill}"/>'
        yield f'<text class="side" x="{x + 16 * chunks + 4}" y="{y}">{kind.value}: {LABELS[kind]}</text>'
        x += 16 * chunks + 180
    if chunks > 1:
        yield f'<text class="side" x="{x}" y="{y}">lighter: a later one of the rank\'s {chunks} chunks</text>'
