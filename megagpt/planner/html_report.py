"""A prediction as one HTML file without other files: memory by stage, where a step's time goes, the pipeline's timeline.

Bars are SVG that stretches to the width of the screen, labels are text beside them, so that a phone shows both. Does not import
torch.
"""

from collections.abc import Iterator, Sequence
from html import escape
from typing import TypeVar

from megagpt.config.schema import Config
from megagpt.planner.hardware import Hardware
from megagpt.planner.predict import Prediction
from megagpt.planner.report import (
    AXES,
    GIB,
    MEMORY_PARTS,
    duration,
    rank_ranges,
    size,
    time_parts,
)
from megagpt.planner.search import SearchResult, reason
from megagpt.planner.stage_times import cost_of
from megagpt.schedules.plan import ActionKind
from megagpt.schedules.registry import make_plan
from megagpt.schedules.simulate import simulate

Item = TypeVar("Item")
MAX_BOXES = 4000
"""Boxes of the timeline; a longer step is shown with fewer micro-batches."""
MAX_ROWS = 8
"""Pipeline ranks in the timeline, and rows of the memory chart."""
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1f2328;--soft:#59636e;--line:#d1d9e0;--card:#f6f8fa;
--c0:#0969da;--c1:#1a7f37;--c2:#bf8700;--c3:#cf222e;--c4:#8250df;--c5:#59636e;--c6:#0598bc;--c7:#e16f24;--c8:#bf3989;--c9:#7d8590}
@media (prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--soft:#9198a1;--line:#3d444d;--card:#151b23;
--c0:#4493f8;--c1:#3fb950;--c2:#d29922;--c3:#f85149;--c4:#ab7df8;--c5:#9198a1;--c6:#39c5cf;--c7:#f0883e;--c8:#db61a2;--c9:#656c76}}
*{box-sizing:border-box}body{margin:0 auto;padding:16px;max-width:860px;background:var(--bg);color:var(--fg);
font:16px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
h1{font-size:1.35rem;margin:.2em 0}h2{font-size:1.1rem;margin:1.6em 0 .5em}p{margin:.4em 0}.soft{color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(145px,1fr));gap:8px;margin:14px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 12px}
.card b{display:block;font-size:1.25rem}.card span{color:var(--soft);font-size:.85rem}
.row{display:grid;grid-template-columns:5.2em 1fr 5.8em;gap:8px;align-items:center;margin:4px 0;font-size:.9rem}
.row.time{grid-template-columns:minmax(9em,15em) 1fr 8.4em}.row svg{width:100%;height:20px;display:block;border-radius:3px}
.row .n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}.back{fill:var(--card)}.limit{fill:var(--c3)}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:.85rem;margin:.4em 0}.legend i{display:inline-block;width:.8em;
height:.8em;border-radius:2px;margin-right:.35em;vertical-align:-.05em}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem}th,td{text-align:left;padding:5px 10px 5px 0;
border-bottom:1px solid var(--line);vertical-align:top}td.n,th.n{text-align:right;
font-variant-numeric:tabular-nums;white-space:nowrap}
.bad{color:var(--c3);font-weight:600}@media (max-width:520px){.row.time{grid-template-columns:1fr 8.4em}
.row.time svg{grid-column:1/3;
grid-row:2}}
"""
KIND_COLOURS = {
    ActionKind.FORWARD: 0,
    ActionKind.BACKWARD: 1,
    ActionKind.BACKWARD_INPUT: 2,
    ActionKind.BACKWARD_WEIGHT: 5,
}
KIND_NAMES = {
    ActionKind.FORWARD: "forward",
    ActionKind.BACKWARD: "backward",
    ActionKind.BACKWARD_INPUT: "backward of inputs",
    ActionKind.BACKWARD_WEIGHT: "backward of weights",
}
MEMORY_NAMES = {"optimizer": "optimizer states", "communication": "communication buffers", "working": "temporary tensors"}


def html_report(
    title: str, config: Config, hardware: Hardware, prediction: Prediction, tokens: int | None, result: SearchResult | None
) -> str:
    """Return the text of the file. `tokens`: tokens of the run, if known; `result`: of the search, if there was one."""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(str(prediction.strategy))}</p>',
        *_cards(prediction, tokens),
        *_memory(prediction),
        *_time(prediction),
        *(_timeline(prediction) if prediction.strategy.pipeline > 1 else []),
        *_traffic(prediction),
        *(_ranking(result) if result is not None else []),
        f'<p class="soft">{hardware.gpus_per_node} GPUs in a node, {hardware.gpu.link:g} GB/s between them, '
        f"{hardware.network:g} GB/s between nodes, {escape(config.training.precision)}. Predicted by megagpt tools/plan.py; "
        "docs/planner.md says how close such predictions are.</p>",
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def _cards(prediction: Prediction, tokens: int | None) -> Iterator[str]:
    values = [
        (duration(prediction.step_seconds), "per step"),
        (f"{prediction.tokens_per_second:,.0f}", "tokens per second"),
        (f"{prediction.mfu:.1%}", f"MFU, {prediction.tflops_per_gpu:.0f} TFLOP/s per GPU"),
        (size(prediction.peak.total), f"peak memory of {size(prediction.memory_limit)}"),
        (f"{prediction.bubble:.1%}", "pipeline bubble"),
        (f"{prediction.parameters / 1e9:,.3g}B", "parameters"),
    ]
    if tokens is not None:
        hours = prediction.gpu_hours(tokens)
        values.append((f"{hours / prediction.strategy.gpus / 24:,.1f} days", f"for {tokens / 1e9:,.0f}B tokens"))
        values.append((f"{hours:,.0f}", "GPU-hours"))
    yield '<div class="cards">'
    yield from (f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in values)
    yield "</div>"
    if not prediction.fits:
        excess = (prediction.peak.total - prediction.memory_limit) / GIB
        yield f'<p class="bad">Does not fit: {excess:.1f} GiB too much on pipeline rank {prediction.peak_rank}.</p>'


def _memory(prediction: Prediction) -> Iterator[str]:
    scale = max(prediction.peak.total, prediction.memory_limit)
    yield "<h2>Memory by pipeline rank</h2>"
    yield _legend([(index, MEMORY_NAMES.get(part, part)) for index, part in enumerate(MEMORY_PARTS)])
    for first, last in _some(rank_ranges(prediction)):
        memory = prediction.memory[first]
        values = [getattr(memory, part) / scale * 100 for part in MEMORY_PARTS]
        name = f"rank {first}" if first == last else f"ranks {first}-{last}"
        limit = prediction.memory_limit / scale * 100
        bar = _bar(list(enumerate(values)), f'<rect class="limit" x="{min(limit, 99.6):.2f}" width=".4" height="10"/>')
        yield f'<div class="row"><span>{name}</span>{bar}<span class="n">{memory.total / GIB:.1f} GiB</span></div>'
    yield f'<p class="soft">The red line is the memory that a run can use: {size(prediction.memory_limit)}.</p>'


def _time(prediction: Prediction) -> Iterator[str]:
    yield "<h2>Where the time of a step goes</h2>"
    parts = time_parts(prediction)
    longest = max((share for _, _, share in parts), default=1.0)
    for index, (name, seconds, share) in enumerate(parts):
        bar = _bar([(index % 10, share / longest * 100)])
        text = f"{duration(seconds)} · {share:.1%}"
        yield f'<div class="row time"><span>{escape(name)}</span>{bar}<span class="n">{text}</span></div>'


def _timeline(prediction: Prediction) -> Iterator[str]:
    """Show some pipeline ranks; of a long step the first micro-batches."""
    strategy = prediction.strategy
    per_micro_batch = 3 * strategy.chunks
    rows = min(strategy.pipeline, MAX_ROWS)
    most = max(1, MAX_BOXES // (rows * per_micro_batch))
    micro_batches = min(strategy.micro_batches, most, max(2 * strategy.pipeline, 16))
    plan = make_plan(strategy.schedule, strategy.pipeline, micro_batches, strategy.virtual_stages)
    simulation = simulate(plan, cost_of(prediction.times), prediction.transfer, in_order=False)
    shown = (
        "" if micro_batches == strategy.micro_batches else f", a step of {micro_batches} instead of {strategy.micro_batches:,}"
    )
    yield f"<h2>Pipeline timeline</h2><p class='soft'>{strategy.schedule}{shown} micro-batches; gaps are the bubble.</p>"
    kinds = [kind for kind in ActionKind if any(action.kind is kind for action in plan.actions[0])]
    yield _legend([(KIND_COLOURS[kind], KIND_NAMES[kind]) for kind in kinds])
    scale = 1000 / simulation.makespan
    for rank in _some(range(strategy.pipeline)):
        boxes = "".join(
            f'<rect x="{simulation.start[action] * scale:.2f}" '
            f'width="{max(0.3, (simulation.end[action] - simulation.start[action]) * scale - 0.4):.2f}" height="10" '
            f'fill="var(--c{KIND_COLOURS[action.kind]})"/>'
            for action in plan.actions[rank]
        )
        picture = (
            '<svg viewBox="0 0 1000 10" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="back" width="1000" height="10"/>{boxes}</svg>'
        )
        idle = f"{simulation.idle_share[rank]:.1%} idle"
        yield f'<div class="row"><span>rank {rank}</span>{picture}<span class="n">{idle}</span></div>'


def _traffic(prediction: Prediction) -> Iterator[str]:
    rows = [(key, value) for key, value in sorted(prediction.traffic.items()) if key[0] in prediction.links]
    if not rows:
        return
    yield '<h2>Communication of a rank in a step</h2><div class="wide"><table>'
    yield '<tr><th>group</th><th>collective</th><th class="n">calls</th><th class="n">GB</th><th>link</th></tr>'
    for (axis, kind), (calls, n_bytes) in rows:
        link = "network" if prediction.links[axis] else "inside the node"
        yield (
            f'<tr><td>{AXES[axis]}</td><td>{kind}</td><td class="n">{calls:,.0f}</td>'
            f'<td class="n">{n_bytes / 1e9:,.2f}</td><td>{link}</td></tr>'
        )
    yield "</table></div>"


def _ranking(result: SearchResult) -> Iterator[str]:
    best = result.ranking[0]
    yield f"<h2>Search</h2><p class='soft'>{result.tried:,} strategies, {result.fitting:,} fit. The fastest of each kind:</p>"
    heads = "".join(f'<th class="n">{head}</th>' for head in ("step", "MFU", "memory"))
    yield f'<div class="wide"><table><tr>{heads}<th>layout</th></tr>'
    for one in result.ranking[:8]:
        why = ""
        if one is not best:
            why = f'<br><span class="soft">{one.step_seconds / best.step_seconds - 1:+.1%}: {escape(reason(best, one))}</span>'
        yield (
            f'<tr><td class="n">{duration(one.step_seconds)}</td><td class="n">{one.mfu:.1%}</td>'
            f'<td class="n">{one.peak.total / GIB:.1f} GiB</td><td>{escape(str(one.strategy))}{why}</td></tr>'
        )
    yield "</table></div>"


def _bar(parts: Sequence[tuple[int, float]], extra: str = "") -> str:
    """Return a stacked bar of (colour, percent)."""
    x, boxes = 0.0, []
    for colour, width in parts:
        boxes.append(f'<rect x="{x:.2f}" width="{width:.2f}" height="10" fill="var(--c{colour})"/>')
        x += width
    back = '<rect class="back" width="100" height="10"/>'
    return f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{back}{"".join(boxes)}{extra}</svg>'


def _legend(entries: Sequence[tuple[int, str]]) -> str:
    items = "".join(f'<span><i style="background:var(--c{colour})"></i>{escape(name)}</span>' for colour, name in entries)
    return f'<div class="legend">{items}</div>'


def _some(items: Sequence[Item]) -> list[Item]:
    """Return at most `MAX_ROWS` items, evenly spaced, with the first and the last."""
    if len(items) <= MAX_ROWS:
        return list(items)
    return [items[round(index * (len(items) - 1) / (MAX_ROWS - 1))] for index in range(MAX_ROWS)]
