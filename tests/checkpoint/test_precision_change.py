"""bf16 to fp32 and back: fp32 weights and moments keep every bit, and what is lost is reported once."""

import contextlib
import io
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from support.checkpoints import LayoutCase, LocalTensor, full_state, layout_config, local_state
from support.pool import Pool
from support.runs import corpus, open_trainer

from megagpt.config import Config
from megagpt.parallel.parameter import shard_of

SHARDED = LayoutCase(4, {"tensor": 2}, 2)
ALONE = LayoutCase(1, {}, 1)
DECAY_STEPS = 15


class Resumed(NamedTuple):
    """A rank of a run that was resumed and trained to its last step."""

    state_before: list[LocalTensor]
    """State after loading, before the remaining steps."""
    state_after: list[LocalTensor]
    output: str
    is_rounded: bool
    """Whether the weights of the forwards are the fp32 weights, rounded to the training precision."""


def resume_and_train(config: Config) -> Resumed:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        trainer = open_trainer(config)
        parameters = trainer.engine.parameters
        before = local_state(trainer.engine, with_moments=trainer.step > 0)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.training.precision]
        masters = {tensor.name: torch.from_numpy(tensor.values["master"]) for tensor in before}
        is_rounded = all(
            torch.equal(p.detach().float().reshape(-1), masters[shard_of(p).name].to(dtype).float().reshape(-1))
            for p in parameters
        )
        trainer.train()
        after = local_state(trainer.engine)
        trainer.close()
    return Resumed(before, after, output.getvalue(), is_rounded)


@pytest.mark.parametrize(("first", "second"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_weights_and_moments_keep_their_bits_in_both_directions(first: str, second: str, ranks: Pool, tmp_path: Path) -> None:
    data, checkpoint = corpus(tmp_path), {"dir": str(tmp_path / "c")}

    def config(layout: LayoutCase, precision: str, steps: int) -> Config:
        # Little work per micro-batch: bf16 products are slow on a CPU.
        model = {"n_layer": 2, "n_positions": 8}
        training = {"precision": precision}
        return layout_config(layout, data, steps, DECAY_STEPS, checkpoint=checkpoint, model=model, training=training)

    runs = [
        ranks.run(4, resume_and_train, config(SHARDED, first, 2)),
        ranks.run(1, resume_and_train, config(ALONE, second, 3)),
        ranks.run(4, resume_and_train, config(SHARDED, first, 4)),
    ]
    for earlier, later in itertools.pairwise(runs):
        saved = full_state([rank.state_after for rank in earlier])
        loaded = full_state([rank.state_before for rank in later])
        assert loaded.keys() == saved.keys()
        assert all(np.array_equal(loaded[key], values) for key, values in saved.items())
        assert all(rank.is_rounded for rank in later)
    there, back = runs[1][0].output, runs[2][0].output
    assert there.count(f"training.precision {first} -> {second}:") == 1
    assert back.count(f"training.precision {second} -> {first}:") == 1
    assert sum(rank.output.count("training.precision") for rank in runs[2]) == 1
    assert "nothing of the trained weights is lost" in (there if second == "fp32" else back)
    assert "forwards use the weights rounded to bf16" in (there if second == "bf16" else back)


def test_another_optimizer_is_reported_and_its_moments_start_at_zero(ranks: Pool, tmp_path: Path) -> None:
    data, checkpoint = corpus(tmp_path), {"dir": str(tmp_path / "c")}
    sgd = {"type": "sgd", "momentum": 0.9}
    ranks.run(1, resume_and_train, layout_config(ALONE, data, 2, DECAY_STEPS, checkpoint=checkpoint))
    config = layout_config(ALONE, data, 3, DECAY_STEPS, checkpoint=checkpoint, optimizer=sgd)
    output = ranks.run(1, resume_with_sgd, config)[0]
    assert "optimizer.type adamw -> sgd: moments that were not saved start at 0" in output


def resume_with_sgd(config: Config) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        trainer = open_trainer(config)
        assert trainer.step == 2
        trainer.train()
        trainer.close()
    return output.getvalue()
