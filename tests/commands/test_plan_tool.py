"""tools/plan.py prints the planner's prediction as text, JSON and HTML, and one sentence for what cannot be."""

import json
import re
from pathlib import Path

import pytest

from megagpt.commands.plan import main
from megagpt.config import load_config
from megagpt.planner.hardware import find_hardware
from megagpt.planner.memory import peak_memory
from megagpt.planner.predict import Planner
from megagpt.planner.strategy import Strategy

SMALL = ["--config", "350M", "--gpus", "8", "--gpu", "H100"]


def test_the_report_has_the_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "6B", "--gpus", "32", "--gpu", "A100-80GB", "--network", "8x200G", "--tokens", "1T"]) == 0
    text = capsys.readouterr().out
    config = load_config("6B")
    prediction = Planner(config, find_hardware("A100-80GB")).predict(Strategy.of(config, 32))
    assert f"{peak_memory(config, Strategy.of(config, 32)).total / 2**30:.1f} GiB of 75.2 GiB" in text
    assert f"MFU {prediction.mfu:.1%}" in text and f"{prediction.tokens_per_second:,.0f} tokens/s" in text
    assert f"1,000,000,000,000 tokens: {1e12 / prediction.tokens_per_second / 86400:,.1f} days" in text
    assert re.search(r"tensor reduce-scatter +[\d,]+ +[\d,.]+  node", text)


def test_json_has_the_same_numbers_and_the_ranking(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    best = tmp_path / "best.json"
    assert main([*SMALL, "--search", "--json", "--write", str(best)]) == 0
    tree = json.loads(capsys.readouterr().out)
    config = load_config(best)
    prediction = Planner(config, find_hardware("H100")).predict(Strategy.of(config, 8))
    assert tree["step_seconds"] == prediction.step_seconds == tree["search"]["ranking"][0]["step_seconds"]
    assert tree["memory_bytes_by_pipeline_rank"][0]["total"] == prediction.memory[0].total
    assert sum(tree["step_seconds_by_part"].values()) == pytest.approx(tree["step_seconds"])
    assert tree["fits"] and tree["problem"] is None
    assert all(one["slower_because"] for one in tree["search"]["ranking"][1:])


def test_a_model_with_an_encoder_has_a_plan_and_a_search(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    assert main(["--config", "t5-v1.1-large", "--gpus", "8", "--gpu", "H100", "--search", "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert "783,150,080 parameters" in text and "the fastest of each kind" in text
    assert "1,310,720,000,000 tokens" in text  # of source and target
    assert "Memory by pipeline rank" in page.read_text()


def test_the_html_report_is_one_file_with_charts_for_light_and_dark(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    assert main(["--config", "6B", "--gpus", "32", "--gpu", "H100", "--html", str(page)]) == 0
    text = page.read_text()
    assert text.count("<svg") >= 10 and "prefers-color-scheme:dark" in text and "width=device-width" in text
    assert not re.search(r"""(?:src|href)=|url\(|@import""", text)
    assert "Pipeline timeline" in text and "Memory by pipeline rank" in text and "Where the time of a step goes" in text


def test_a_layout_that_does_not_fit_is_an_error_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "13B", "--gpus", "8", "--gpu", "A100-40GB", "--set", "training.micro_batch_size=16"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    match = re.fullmatch(
        r"error: the layout does not fit: pipeline rank 0 needs ([\d.]+) GiB, ([\d.]+) GiB more than a run can use on "
        r"A100-40GB; the nearest layout that fits: --set (.*)\n",
        error,
    )
    assert match and float(match[1]) == pytest.approx(40 * 0.94 + float(match[2]), abs=0.11)
    assert main([*arguments, *match[3].split()]) == 0  # after --set


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "175C", "--gpus", "8", "--gpu", "H100"], "175C: no such config: .*nearest: 175B"),
        (["--config", "350M", "--gpus", "8", "--gpu", "V99"], "--gpu V99: unknown GPU; known: A100-40GB"),
        (["--config", "350M", "--gpus", "0", "--gpu", "H100"], "--gpus 0: expected 1 or more"),
        (["--config", "6B", "--gpus", "3", "--gpu", "H100"], "parallel: a world of 3 ranks does not fit tensor 4"),
        ([*SMALL, "--set", "model.n_head=7"], "model.n_head: 7 heads do not divide model.n_embd 1024"),
        ([*SMALL, "--write", "x.json"], "--write: writes the layout that --search finds; add --search"),
        ([*SMALL, "--set", "lora.rank=4"], "lora.rank: the planner covers runs that train all weights"),
        ([*SMALL, "--html", "/nowhere/x.html"], "/nowhere/x.html: No such file or directory"),
        (["--config", "quickstart", "--gpus", "4", "--gpu", "H100"], "model.vocab_size: set it"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("error: ") and "Traceback" not in error


def test_schedule_auto_is_chosen_as_a_run_chooses_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "6B", "--gpus", "32", "--gpu", "H100", "--json"]
    assert main([*arguments, "--set", "parallel.schedule=auto"]) == 0
    auto = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    fixed = json.loads(capsys.readouterr().out)
    assert auto["strategy"]["schedule"] != "auto" and auto["step_seconds"] < fixed["step_seconds"]


def test_the_plan_of_a_model_with_an_encoder_has_the_sums_of_its_shared_weights(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["model.encoder_layers=3", "model.n_layer=3", "parallel.pipeline=4", "parallel.tensor=2", "zero.stage=1"]
    assert main(["--config", "t5-v1.1-base", "--gpus", "16", "--gpu", "H100", "--json", "--set", *layout]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["problem"] is None and tree["gpus"] == 16
    total = sum(memory["parameters"] for memory in tree["memory_bytes_by_pipeline_rank"])
    assert len(tree["memory_bytes_by_pipeline_rank"]) == 4 and 2 * total > tree["parameters"]  # two tensor ranks, and copies
    calls = {(one["axis"], one["kind"]): one for one in tree["communication_per_step"]}
    assert calls["shared weights", "all-reduce"]["calls"] >= 1 and calls["pipeline", "send"]["bytes"] > 0
