"""The evaluate command: its numbers on standard output and as JSON, and refusals."""

import json
from pathlib import Path

import pytest
from support.encoder_decoder import T5
from support.trained import load_trained, write_random

from megagpt.commands.evaluate import main
from megagpt.inference.beam_search import BeamSearch
from megagpt.inference.perplexity import documents_of, measure
from megagpt.inference.targets import TargetWriter
from megagpt.inference.text_scores import text_scores


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("evaluate"), "byte", 257, 32)


def test_the_report_has_the_measured_numbers(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {n} " * 9}) + "\n" for n in range(3)))
    output = tmp_path / "result.json"
    command = ["--checkpoint", str(checkpoint), "--data", str(tmp_path / "texts.jsonl"), "--max-documents", "2"]
    assert main([*command, "--output", str(output)]) == 0
    trained = load_trained(checkpoint)
    documents = list(documents_of(str(tmp_path / "texts.jsonl"), trained.tokenizer))[:2]
    expected = measure(trained, documents, 16).report()
    result = json.loads(output.read_text())
    assert result == {"data": str(tmp_path / "texts.jsonl"), "stride": 16, **expected}
    assert f"token_perplexity  {expected['token_perplexity']:,.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such file, folder or match"),
        (["--data", "setup.py", "--stride", "0"], "--stride 0: expected 1 or more"),
        (["--data", "setup.py", "--stride", "33"], "--stride 33: expected 1 to 32, the model's context"),
        (["--data", "setup.py", "--limit", "3"], "--limit: goes with --tasks"),
        (["--data", "setup.py", "--tensor", "2"], "--tensor 2: there is 1 process"),
        (["--pairs", "setup.py", "--beams", "0"], "--beams 0: expected 1 or more"),
        (["--pairs", "setup.py", "--stride", "3"], "--stride: goes with --data"),
        (["--pairs", "setup.py"], "setup.py"),
        (["--tasks", "x", "--stride", "3"], "--stride: goes with --data"),
        (["--tasks", "x", "--include-path", "nowhere"], "--include-path nowhere: no such folder"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(checkpoint), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_data_without_a_text_is_an_error(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert main(["--checkpoint", str(checkpoint), "--data", str(tmp_path / "empty.txt")]) == 2
    assert "has no text" in capsys.readouterr().err


def test_the_scores_of_pairs_are_those_of_what_the_model_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The references are what the model writes."""
    pytest.importorskip("rouge_score")
    checkpoint = write_random(tmp_path, "byte", 257, 32, **T5)
    writer = TargetWriter(load_trained(checkpoint), BeamSearch(beams=2, max_tokens=8))
    sources = ["one", "a second source", "three"]
    written = [target.text for target in writer.write(sources)]
    lines = [json.dumps({"source": source, "target": text}) for source, text in zip(sources, written, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    command = ["--checkpoint", str(checkpoint), "--pairs", str(tmp_path / "pairs.jsonl"), "--beams", "2", "--max-tokens", "8"]
    assert main([*command, "--output", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {"pairs": str(tmp_path / "pairs.jsonl"), "examples": 3, **text_scores(written, written)}
    assert result["chrf"] == pytest.approx(100) and "chrf" in capsys.readouterr().out
