"""Scores of written texts follow the published formulas, on texts that are counted by hand."""

import json
from pathlib import Path

import pytest

from megagpt.errors import DataError
from megagpt.inference.text_scores import Pair, read_pairs, text_scores

pytest.importorskip("rouge_score")


def test_rouge_is_the_mean_f_measure_of_common_words_pairs_and_subsequences() -> None:
    """The first text: 3 of its 4 words and 1 of its 3 pairs are in the reference of 5 words; "cats" and "cat" have one stem."""
    scores = text_scores(["the cats sat there", "yes"], ["the dog and cat sat", "yes"])

    def f_measure(common: int, written: int, reference: int) -> float:
        return 2 * common / (written + reference)

    assert scores["rouge1"] == pytest.approx(100 * (f_measure(3, 4, 5) + 1) / 2)
    assert scores["rougeL"] == pytest.approx(100 * (f_measure(3, 4, 5) + 1) / 2)
    assert scores["rouge2"] == pytest.approx(100 * (f_measure(1, 3, 4) + 0) / 2)  # one word has no pair


def test_bleu_and_chrf_are_100_for_equal_texts_and_0_for_different_ones() -> None:
    text = "a sentence of some length is here"
    assert text_scores([text], [text])["bleu"] == pytest.approx(100)
    different = text_scores(["zzz"], ["bbb ccc ddd"])
    assert different["bleu"] < 20 and different["chrf"] == 0 and different["rouge1"] == 0


def test_pairs_are_read_up_to_a_limit_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"source": str(n), "target": "t"}) + "\n" for n in range(3)) + '{"source": "a"}\n')
    assert read_pairs(path, 2) == [Pair("0", "t"), Pair("1", "t")]
    with pytest.raises(DataError, match='pairs.jsonl:4: expected texts under "source" and "target"; found \'source\''):
        read_pairs(path)
    path.write_text("")
    with pytest.raises(DataError, match="pairs.jsonl: has no pair"):
        read_pairs(path)
