"""tools/plot_losses.py draws the losses of runs; an error is one line with exit code 2."""

import json
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from megagpt.commands.plot_losses import main, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(path: Path, records: list[dict], tail: str = "") -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return str(path)


@pytest.fixture
def metrics(tmp_path: Path) -> str:
    """Ten training records, one of them NaN, and two evaluations."""
    records: list[dict] = [{"step": step, "loss": 7.0 - step / 5 if step != 4 else float("nan")} for step in range(1, 11)]
    evaluations = [{"step": 5, "eval_loss": 6.1, "eval_perplexity": 445.9}, {"step": 10, "eval_loss": 5.2}]
    return write(tmp_path / "metrics.jsonl", records + evaluations)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> "list[Figure]":
    """The figures that were saved."""
    from matplotlib.figure import Figure

    saved: list[Figure] = []
    save = Figure.savefig

    def record(figure: Figure, *args: object) -> None:
        saved.append(figure)
        save(figure, *args)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


def test_the_image_has_both_curves_and_the_reference_line(metrics: str, tmp_path: Path, figures: "list[Figure]") -> None:
    output = tmp_path / "loss.png"
    assert main(["--metrics", metrics, "--output", str(output), "--hline", "5.9", "--hline-label", "unigram entropy"]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    training, validation, reference = figures[0].axes[0].lines
    assert len(training.get_xdata()) == 10
    assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([5, 10], [6.1, 5.2])
    assert set(reference.get_ydata()) == {5.9}
    assert "unigram entropy" in str(reference.get_label())


def test_the_suffix_selects_the_image_format(metrics: str, tmp_path: Path) -> None:
    output = tmp_path / "loss.svg"
    assert main(["--metrics", metrics, "--metrics", metrics, "--output", str(output)]) == 0
    assert ElementTree.parse(output).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    "files, names",
    [
        (["a/metrics.jsonl", "b/metrics.jsonl"], ["a", "b"]),
        (["a/one.jsonl", "a/two.jsonl"], ["one", "two"]),
        (["a/one.jsonl", "b/one.jsonl", "b/two.jsonl"], ["a/one.jsonl", "b/one.jsonl", "b/two.jsonl"]),
    ],
)
def test_runs_are_named_by_what_distinguishes_them(
    files: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: "list[Figure]"
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = []
    for file in files:
        Path(file).parent.mkdir(exist_ok=True)
        arguments += ["--metrics", write(Path(file), [{"step": 1, "loss": 2.0}])]
    assert main([*arguments, "--output", "loss.png"]) == 0
    labels = [str(line.get_label()) for line in figures[0].axes[0].lines]
    assert labels[::2] == [f"{name}: training" for name in names]


def test_a_loss_that_is_null_is_not_drawn(tmp_path: Path, figures: "list[Figure]") -> None:
    path = write(tmp_path / "m.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}])
    assert main(["--metrics", path, "--output", str(tmp_path / "loss.png")]) == 0
    assert list(figures[0].axes[0].lines[0].get_xdata()) == [1, 3]


def test_the_incomplete_last_line_of_a_run_in_progress_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [{"step": 1, "loss": 2.0}], tail='{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"step": 1, "eval_loss": 2.0}\n', "has no line with a loss yet"),
        ("", "has no line with a loss yet"),
        ('{"step": 1, "loss": 2.0}\nnonsense\n', "line 2 is not a JSON record with a step"),
        ('{"step": 1, "loss": null, "loss_text": "nan"}\n', "has no line with a loss yet"),
        ("x" * 2**20 + "y", "line 1 is not a JSON record with a step"),
        ("[1]\n", "line 1 is not a JSON record with a step"),
    ],
)
def test_a_file_that_is_not_a_metrics_file_is_refused_with_the_wrong_line(
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
