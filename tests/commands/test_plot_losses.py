"""tools/plot_losses.py: what is drawn, and what is refused in one line."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megagpt.commands.plot_losses import main, read_metrics


def write(path: Path, records: list[dict], tail: str = "") -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return str(path)


@pytest.fixture
def metrics(tmp_path: Path) -> str:
    """Ten training records, one of them NaN, and two evaluations."""
    records: list[dict] = [{"step": step, "loss": 7.0 - step / 5 if step != 4 else float("nan")} for step in range(1, 11)]
    evaluations = [{"step": 5, "eval_loss": 6.1, "eval_perplexity": 445.9}, {"step": 10, "eval_loss": 5.2}]
    return write(tmp_path / "metrics.jsonl", records + evaluations)


def test_the_picture_has_both_curves_and_the_reference(metrics: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kw: (drawn.append(figure), save(figure, *args, **kw)))
    output = tmp_path / "loss.png"
    assert main(["--metrics", metrics, "--output", str(output), "--hline", "5.9", "--hline-label", "unigram entropy"]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    training, validation, reference = drawn[0].axes[0].lines
    assert len(training.get_xdata()) == 10
    assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([5, 10], [6.1, 5.2])
    assert set(reference.get_ydata()) == {5.9}
    assert "unigram entropy" in str(reference.get_label())


def test_the_suffix_decides_the_format(metrics: str, tmp_path: Path) -> None:
    output = tmp_path / "loss.svg"
    assert main(["--metrics", metrics, "--metrics", metrics, "--output", str(output)]) == 0
    assert ElementTree.parse(output).getroot().tag.endswith("svg")


def test_a_run_in_progress_can_be_drawn_its_unfinished_line_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [{"step": 1, "loss": 2.0}], tail='{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"step": 1, "eval_loss": 2.0}\n', "has no line with a loss yet"),
        ("", "has no line with a loss yet"),
        ('{"step": 1, "loss": 2.0}\nnonsense\n', "line 2 is not a JSON record with a step"),
        ("[1]\n", "line 1 is not a JSON record with a step"),
    ],
)
def test_a_file_that_is_no_metrics_file_is_refused_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(text)
    assert main(["--metrics", str(path), "--output", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err.strip().endswith(message)


def test_a_missing_file_and_an_unknown_format_are_refused(
    metrics: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--metrics", str(tmp_path / "none.jsonl"), "--output", "a.png"]) == 2
    assert "none.jsonl: not a metrics file: No such file or directory" in capsys.readouterr().err
    assert main(["--metrics", metrics, "--output", str(tmp_path / "a.xyz")]) == 2
    assert "a.xyz: cannot be written" in capsys.readouterr().err
