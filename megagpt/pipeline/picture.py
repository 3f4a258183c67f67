"""A plan's timeline as an SVG: one row for each rank, one box for each action."""

import math
from collections.abc import Iterator
from xml.sax.saxutils import escape

from megagpt.pipeline.plan import Action, Kind, Plan
from megagpt.pipeline.simulate import Simulation

COLOURS = {Kind.F: "#2f6fb7", Kind.B: "#3a9a68", Kind.I: "#d9822b", Kind.W: "#7c8894"}
MEANINGS = {Kind.F: "forward", Kind.B: "whole backward", Kind.I: "backward for the input", Kind.W: "weight gradients"}
LEFT, TOP, WIDTH, RIGHT = 64, 48, 1080, 110
"""Pixels left of the boxes, above them, that the makespan takes, and to the right of it."""
ROW, BOX, BELOW = 34, 28, 64
"""Pixels of a row, of its boxes, and below all rows."""
STYLE = """text{font:12px Helvetica,Arial,sans-serif;fill:#24292f}
.title{font-size:15px;font-weight:bold}.side{fill:#57606a}.axis{fill:#8c959f;font-size:10px}
.n{font-size:10px;text-anchor:middle}.on-dark{fill:#fff}rect{stroke:#fff;stroke-width:.6}.idle{fill:#f0f2f4;stroke:none}"""


def draw(plan: Plan, played: Simulation, title: str) -> str:
    """The text of an SVG file; `played` is how `plan` went.

    Colour says the kind of action, a lighter shade a later chunk of the rank; the number is the micro-batch. Where there
    is no box the rank idles. To the right: each rank's idle share, and the most activations it holds, in micro-batches
    through all of its layers.
    """
    width, height = LEFT + WIDTH + RIGHT, TOP + ROW * plan.n_ranks + BELOW
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="100%" height="100%" fill="#fff"/><text class="title" x="{LEFT}" y="22">{escape(title)}</text>',
        f'<text class="side" x="{LEFT + WIDTH + 12}" y="{TOP - 8}">idle · held</text>',
    ]
    for rank in range(plan.n_ranks):
        lines += _row(plan, played, rank)
    lines += _axis(played.makespan, TOP + ROW * plan.n_ranks)
    lines += _legend(plan, height - 14)
    return "\n".join([*lines, "</svg>", ""])


def _row(plan: Plan, played: Simulation, rank: int) -> Iterator[str]:
    top = TOP + ROW * rank
    held = played.peak_live[rank] * plan.n_ranks / plan.n_stages
    middle = top + BOX / 2 + 4
    yield f'<text class="side" x="{LEFT - 10}" y="{middle:g}" text-anchor="end">rank {rank}</text>'
    yield f'<rect class="idle" x="{LEFT}" y="{top}" width="{WIDTH}" height="{BOX}"/>'
    for action in plan.actions[rank]:
        yield _box(plan, played, action, top)
    yield f'<text x="{LEFT + WIDTH + 12}" y="{middle:g}">{played.idle_share[rank]:.1%} · {held:.3g}</text>'


def _box(plan: Plan, played: Simulation, action: Action, top: int) -> str:
    scale = WIDTH / played.makespan
    start, end = played.start[action], played.end[action]
    stages = plan.stages_of(plan.rank_of_stage[action.stage])
    shade = stages.index(action.stage) / len(stages)
    x, width = LEFT + start * scale, (end - start) * scale
    about = f"{MEANINGS[action.kind]} of micro-batch {action.micro_batch} on stage {action.stage}, {start:.4g} to {end:.4g}"
    number = ""
    if width >= 7 * len(str(action.micro_batch)):
        contrast = "n" if shade >= 0.4 else "n on-dark"
        number = f'<text class="{contrast}" x="{x + width / 2:.1f}" y="{top + BOX / 2 + 3.5:g}">{action.micro_batch}</text>'
    rect = f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{BOX}" fill="{_lighter(COLOURS[action.kind], shade)}"/>'
    return f"<g><title>{about}</title>{rect}{number}</g>"


def _lighter(colour: str, share: float) -> str:
    """`colour` (#rrggbb) mixed with `share` of white."""
    parts = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


def _axis(makespan: float, top: int) -> Iterator[str]:
    step = next(step for step in _round_steps(makespan) if makespan / step <= 12)
    for number in range(int(makespan / step) + 1):
        x = LEFT + WIDTH * number * step / makespan
        yield f'<text class="axis" x="{x:.1f}" y="{top + 10}" text-anchor="middle">{number * step:.4g}</text>'


def _round_steps(makespan: float) -> Iterator[float]:
    """1, 2, 5, 10, ... times a power of ten far below `makespan`."""
    power = 10.0 ** (math.floor(math.log10(makespan)) - 2)
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _legend(plan: Plan, y: int) -> Iterator[str]:
    kinds = [kind for kind in Kind if any(action.kind is kind for order in plan.actions for action in order)]
    chunks = plan.n_stages // plan.n_ranks
    x = LEFT
    for kind in kinds:
        for chunk in range(chunks):
            fill = _lighter(COLOURS[kind], chunk / chunks)
            yield f'<rect x="{x + 16 * chunk}" y="{y - 11}" width="14" height="14" fill="{fill}"/>'
        yield f'<text class="side" x="{x + 16 * chunks + 4}" y="{y}">{kind.value}: {MEANINGS[kind]}</text>'
        x += 16 * chunks + 180
    if chunks > 1:
        yield f'<text class="side" x="{x}" y="{y}">lighter: the later of a rank\'s {chunks} chunks</text>'
