"""The evaluate command: its numbers on standard output and as JSON, and refusals."""

import json
from pathlib import Path

import pytest
from support.trained import load_trained, write_random

from megagpt.commands.evaluate import main
from megagpt.inference.perplexity import documents_of, measure


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
