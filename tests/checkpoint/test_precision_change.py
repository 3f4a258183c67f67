"""bf16 to fp32 and back: the fp32 weights and moments keep every bit, and what is lost is said once."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint.test_resharding import config_of, held, whole
from support.pool import Pool
from support.runs import Tree, corpus, open_trainer

from megagpt.config import Config
from megagpt.parallel.shard import shard_of

SHARDED = (4, {"tensor": 2}, 2)
ALONE = (1, {}, 1)


def train_and_tell(config: Config) -> tuple[object, str, bool]:
    """What this rank holds before the steps that are left, what was said, and whether forwards see the weights rounded."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        trainer = open_trainer(config)
        found = held(trainer)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.training.precision]
        masters = {
            shard_of(p).name: next(v for n, _, v in found if n == shard_of(p).name)["master"] for p in trainer.engine.parameters
        }
        rounded = all(
            torch.equal(
                p.detach().float().reshape(-1), torch.from_numpy(masters[shard_of(p).name]).to(dtype).float().reshape(-1)
            )
            for p in trainer.engine.parameters
        )
        trainer.train()
        after = held(trainer)
        trainer.close()
    return (found, after), said.getvalue(), rounded


@pytest.mark.parametrize(("first", "second"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_weights_and_moments_keep_their_bits(first: str, second: str, ranks: Pool, tmp_path: Path) -> None:
    data, checkpoint = corpus(tmp_path), {"dir": str(tmp_path / "c")}

    def config(layout: tuple[int, Tree, int], precision: str, steps: int) -> Config:
        length = {"steps": steps, "precision": precision}
        # One micro-batch of the least work: bf16 products are slow on a CPU.
        tree = config_of(layout, data, steps, checkpoint=checkpoint, model={"n_layer": 2, "n_positions": 8})
        return tree.model_copy(update={"training": tree.training.model_copy(update=length)})

    before = ranks.run(4, train_and_tell, config(SHARDED, first, 2))
    after = ranks.run(1, train_and_tell, config(ALONE, second, 3))
    back = ranks.run(4, train_and_tell, config(SHARDED, first, 4))
    ended = {"first": before, "second": after}
    for earlier, later in ((ended["first"], after), (ended["second"], back)):
        expected, loaded = whole([told[1] for told, _, _ in earlier]), whole([told[0] for told, _, _ in later])
        assert all(np.array_equal(loaded[key], values) for key, values in expected.items())
        assert all(rounded for _, _, rounded in later)
    there, again = after[0][1], back[0][1]
    assert there.count(f"training.precision {first} -> {second}:") == 1
    assert again.count(f"training.precision {second} -> {first}:") == 1
    assert sum(said.count("training.precision") for _, said, _ in back) == 1
    kept = "nothing of the trained weights is lost"
    assert kept in (there if second == "fp32" else again)
    assert "forwards see them rounded to bf16" in (there if second == "bf16" else again)


def test_another_rule_is_said_and_its_moments_begin_at_zero(ranks: Pool, tmp_path: Path) -> None:
    data, checkpoint = corpus(tmp_path), {"dir": str(tmp_path / "c")}
    sgd = {"type": "sgd", "momentum": 0.9}
    ranks.run(1, train_and_tell, config_of(ALONE, data, 2, checkpoint=checkpoint))
    said = ranks.run(1, resumed_with_sgd, config_of(ALONE, data, 3, checkpoint=checkpoint, optimizer=sgd))[0]
    assert "optimizer.type adamw -> sgd: moments that were not kept begin at 0" in said


def resumed_with_sgd(config: Config) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        trainer = open_trainer(config)
        assert trainer.step == 2
        trainer.train()
        trainer.close()
    return said.getvalue()
