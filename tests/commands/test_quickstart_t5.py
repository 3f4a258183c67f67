"""tools/quickstart_t5.py: summaries in a text, order of the steps, check of the result; its training is only recorded."""

from pathlib import Path

import pytest
from support.scratch_clone import build_clone

from megagpt.commands import preprocess_data, quickstart_t5, train_tokenizer
from megagpt.commands.quickstart_steps import StepError
from megagpt.commands.quickstart_summaries import summary_pairs
from megagpt.config import load_config
from megagpt.data.blend import build_datasets
from megagpt.data.encoder_samples import EncoderFormat
from megagpt.errors import DataError

CODE = '''
class Stack:
    @property
    def top(self, default=None):
        """Return the last item of the stack.

        More text that is not in the summary.
        """
        if not self.items:
            return default
        return self.items[-1]

    def short(self):
        """Return nothing that is of use here."""
'''


def test_a_function_without_its_docstring_is_summarized_by_the_first_line_of_it() -> None:
    (pair,) = summary_pairs([CODE])
    assert pair.target == "Return the last item of the stack."
    assert pair.source.startswith("def top(self, default=None):\n    if not") and pair.source.endswith("self.items[-1]")
    assert "Return" not in pair.source and "More text" not in pair.source


def test_a_paragraph_is_summarized_by_its_first_sentence() -> None:
    paragraph = "The war ended in that year. " + "No one knew what would follow it, and few people asked. " * 5
    (pair,) = summary_pairs([f"A title\n\n{paragraph}\n\nToo short. To use.\n"])
    assert pair.target == "The war ended in that year." and pair.source.startswith("No one knew what")


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with a text of 300 functions with docstrings."""
    build_clone(tmp_path)
    (tmp_path / "code").mkdir()
    for number in range(300):
        words = f"value{number % 7} of part{number % 11}"
        lines = [f"def f{number}(x):", f'    """Return the {words}."""', f"    y = x.part{number % 11}", "    z = y + 1"]
        (tmp_path / "code" / f"{number}.py").write_text("\n".join([*lines, f"    return z.value{number % 7}\n"]) + "# " * 300)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_steps(loss: float) -> list[str]:
    """Run all steps; those that prepare the data in this process, and the others only recorded. Return their scripts."""
    scripts = []

    def run_step(title: str, command: str, live: bool = False) -> None:
        words = command.split()
        scripts.append(next(Path(word).stem for word in words if word.endswith(".py")))
        if scripts[-1] == "pretrain_t5":
            quickstart_t5.FOLDER.metrics.write_text(f'{{"step": 1, "eval_loss": {loss}}}\n')
        elif scripts[-1] == "train_tokenizer":
            assert train_tokenizer.main([*words[2:-1], "600"]) == 0
        elif scripts[-1] == "preprocess_data":
            assert preprocess_data.main(words[2:]) == 0

    quickstart_t5.run_all_steps(Path("code"), run_step)
    return scripts


def test_the_steps_prepare_pretrain_tune_score_and_write(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuning = ["preprocess_data", "pretrain_t5", "evaluate", "generate_text"]
    assert run_steps(loss=1.0) == ["train_tokenizer", "preprocess_data", "pretrain_t5", *tuning]
    assert run_steps(loss=1.0) == ["pretrain_t5", *tuning]  # the tokens of the same text are used again
    assert "300, of which 15 are held out" in capsys.readouterr().out
    assert len(quickstart_t5.HELD_OUT.read_text().splitlines()) == 15
    overrides = quickstart_t5.tuning_command().split("--set ")[1].split()
    config = load_config(str(quickstart_t5.CONFIG), overrides)
    pairs = build_datasets(config.data, config.model.n_positions, EncoderFormat(config.model.source_length, 0)).train
    assert pairs.samples_per_epoch == round(0.97 * 285)


def test_a_model_that_has_not_learned_from_context_is_an_error(clone: Path) -> None:
    with pytest.raises(StepError, match="the held-out loss 9.000 is not below 90% of the unigram entropy"):
        run_steps(loss=9.0)


def test_a_text_without_summaries_is_refused(clone: Path) -> None:
    with pytest.raises(DataError, match="the text has 0 functions with a docstring and paragraphs"):
        quickstart_t5.run_all_steps(Path("notes"), lambda *args, **keys: None)
