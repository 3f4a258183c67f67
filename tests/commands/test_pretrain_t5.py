"""pretrain_t5.py trains a model with an encoder, resumes it in another layout, and refuses one without an encoder."""

from pathlib import Path

import pytest
from support.encoder_decoder import t5_config
from support.pool import Pool
from support.runs import Tree, compare, corpus, run_trainer

from megagpt.commands.pretrain_t5 import main
from megagpt.config import Config

ROOT = Path(__file__).parents[2]


def test_a_config_without_an_encoder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(ROOT / "configs" / "125M.json")]) == 2
    assert "125M.json: model.encoder_layers: 0, but pretrain_t5.py trains an encoder" in capsys.readouterr().err


def test_the_config_of_a_shipped_t5_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "configs" / "t5-v1.1-base.json"
    assert main(["--config", str(config), "--set", "parallel.tensor=2", "--print-config"]) == 0
    assert '"encoder_layers": 12' in capsys.readouterr().out


def run_config(folder: Path, name: str, steps: int, **parallel: int | str | bool) -> Config:
    """Return the config of a run on span corruption that saves its last step."""
    data: Tree = {
        "task": "span_corruption",
        "train": corpus(folder, vocab_size=256),
        "tokenizer": "byte",
        "span_corruption": {"sentinels": 10},
    }
    return t5_config(
        model={"vocab_size": 280},
        data=data,
        parallel=parallel,
        training={"steps": steps, "global_batch_size": 4},
        optimizer={"type": "sgd", "learning_rate": 0.3, "clip_grad": 0.0, "weight_decay": 0.0},
        lr_schedule={"type": "constant"},
        checkpoint={"dir": str(folder / name)},
        logging={"metrics_file": str(folder / f"{name}.jsonl"), "interval": 1},
    )


def test_a_run_on_span_corruption_continues_in_another_layout_as_one_process_does(ranks: Pool, tmp_path: Path) -> None:
    """Data, losses and weights; the checkpoint has each shared parameter once."""
    expected = ranks.run(1, run_trainer, run_config(tmp_path, "one", 4))
    ranks.run(4, run_trainer, run_config(tmp_path, "divided", 2, pipeline=4, schedule="zb_h1"))
    results = ranks.run(4, run_trainer, run_config(tmp_path, "divided", 4, pipeline=2, tensor=2))
    losses = results[0]["losses"]
    assert losses == pytest.approx(expected[0]["losses"][-len(losses) :], rel=1e-5) and len(losses) >= 2
    for result in (*results, *expected):
        result["losses"], result["norms"] = [], []
    compare(results, expected)
