"""`pretrain_gpt.py --dry-run` counts what one rank of a run of any size does, in seconds and little memory."""

import resource

import pytest

from megagpt.commands.pretrain import main
from megagpt.config import load_config
from megagpt.parallel.topology import Layout
from megagpt.planner.hardware import find_hardware
from megagpt.planner.memory import predict_memory
from megagpt.planner.predict import Planner
from megagpt.planner.rank_report import report_rank
from megagpt.planner.rank_work import rank_traffic
from megagpt.planner.strategy import Strategy


def test_a_trillion_parameters_on_3072_ranks_are_counted_as_the_planner_predicts() -> None:
    config = load_config("1T", ["training.global_batch_size=3072"])
    layout = Layout(tensor=8, pipeline=64, data=6)
    strategy = Strategy.of(config, 3072)
    rank = layout.ranks_along(5, "pipeline")[20]
    report = report_rank(config, layout, rank, compiled=True)
    memory = predict_memory(config, strategy)[20]
    assert (report.parameters, report.peak_saved_bytes) == (memory.parameters, memory.activations)
    predicted = rank_traffic(config, strategy, 20)
    for key, amount in report.traffic.items():
        if key.call != "receive":
            assert predicted[key.group, key.call][1] == pytest.approx(amount.bytes, rel=1e-12), key
    # All matrix products of 62 such stages and of both ends are the hardware FLOPs without attention.
    prediction = Planner(config, find_hardware("H100")).predict(strategy)
    ranks = 3072
    assert report.product_flops * ranks == pytest.approx(prediction.hardware_flops, rel=0.05)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB


def test_the_command_prints_the_counts_and_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "6B", "--dry-run", "--rank", "5", "--world-size", "16", "--set", "model.n_layer=2"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "rank         5 of 16: pipeline 0 of 2, data 1 of 2, context 0 of 1, tensor 1 of 4" in text
    assert "dp_cp reduce                  2" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "8"], "error: --rank 8: expected 0 to 7, because there are 8 ranks"),
        (["--world-size", "3"], "error: parallel: a world of 3 ranks does not fit tensor 4 x pipeline 2"),
        (["--set", "lora.rank=4"], "error: lora.rank: the planner covers runs that train all weights"),
    ],
)
def test_ranks_that_do_not_exist_and_frozen_weights_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", "6B", "--dry-run", *arguments]) == 2
    assert capsys.readouterr().err.startswith(message)
