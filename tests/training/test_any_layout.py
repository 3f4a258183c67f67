"""Layouts, schedules, ZeRO stages, shapes and batch splits drawn at random train as one process does.

30 draws by default, the same each time. For other draws:
MEGAGPT_LAYOUT_DRAWS=300 python -m pytest tests/training/test_any_layout.py
"""

import os

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from support.pool import Pool
from support.runs import Tree, compare, tiny_config, train

from megagpt.schedules.registry import SCHEDULES

DRAWS = int(os.environ.get("MEGAGPT_LAYOUT_DRAWS", "30"))
STEPS = 2
DROPOUTS: list[Tree] = [{}, {"embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2}]


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, Tree, Tree]:
    """Draw a world size, the sections that describe the run, and those that describe the layout."""
    tensor = draw(st.sampled_from([1, 1, 2, 4]))
    pipeline = draw(st.sampled_from([size for size in (1, 2, 4) if size * tensor <= 8]))
    context = draw(st.sampled_from([size for size in (1, 2, 4) if size * tensor * pipeline <= 8 and size * tensor <= 4]))
    data = draw(st.sampled_from([size for size in (1, 2, 4) if size * tensor * pipeline * context <= 8]))
    micro = draw(st.sampled_from([1, 2]))
    per_rank = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    run: Tree = {
        "model": {
            "n_layer": draw(st.integers(max(2, 2 * pipeline), 9)),
            "n_embd": draw(st.sampled_from([16, 32])),
            "n_positions": draw(st.sampled_from([8, 16])),
            "vocab_size": draw(st.integers(17, 70)),  # the last tensor ranks may have padding only
            "tie_embeddings": draw(st.booleans()),
            **draw(st.sampled_from(DROPOUTS)),
        },
        "training": {
            "steps": STEPS,
            "micro_batch_size": micro,
            "global_batch_size": micro * data * per_rank,
            "seed": draw(st.integers(0, 99)),
        },
        "optimizer": {"type": draw(st.sampled_from(["adamw", "sgd"]))},
    }
    parallel: Tree = {"tensor": tensor, "pipeline": pipeline, "context": context}
    parallel |= {"sequence_parallel": tensor > 1 and draw(st.booleans())}
    if pipeline > 1:
        parallel["schedule"] = draw(st.sampled_from(list(SCHEDULES)))
        if SCHEDULES[parallel["schedule"]].interleaved:
            parallel["virtual_stages"] = draw(st.integers(2, run["model"]["n_layer"] // pipeline))
    layout: Tree = {
        "parallel": parallel,
        "zero": {"stage": draw(st.integers(0, 3 if pipeline == 1 else 2))},
        "training": {
            "recompute": draw(st.sampled_from(["none", "selective", "full"])),
            "micro_batch_size": micro * draw(st.sampled_from([split for split in (1, 2) if per_rank % split == 0])),
        },
    }
    return tensor * pipeline * context * data, run, layout


@settings(max_examples=DRAWS, deadline=None, derandomize=DRAWS == 30, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_layout_trains_as_one_process_does(ranks: Pool, case: tuple[int, Tree, Tree]) -> None:
    world, run, layout = case
    note(f"{world} ranks: {run} {layout}")
    training = {**run["training"], **layout["training"]}
    config = tiny_config(**{**run, "training": training, "parallel": layout["parallel"], "zero": layout["zero"]})
    expected = ranks.run(1, train, tiny_config(**run), STEPS)
    compare(ranks.run(world, train, config, STEPS), expected)
