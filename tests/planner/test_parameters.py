"""The closed formula, against Hugging Face's GPT-2, and the shipped shapes, against their papers."""

from pathlib import Path

import pytest

from megagpt.config import data_parallel_size, load_config
from megagpt.config.schema import ModelConfig
from megagpt.planner.parameters import parameter_count

CONFIGS = Path(__file__).parents[2] / "configs"
PAPERS = {  # billions of parameters as printed, and how far the printed figure is from its own shape
    "125M": (0.125, 0.02),
    "350M": (0.350, 0.02),
    "1.3B": (1.3, 0.02),
    "2.7B": (2.7, 0.02),
    "6B": (6.7, 0.01),
    "13B": (13.0, 0.015),
    "22B": (22.0, 0.015),
    "175B": (175.0, 0.005),
    "530B": (530.0, 0.005),
    "1T": (1000.0, 0.01),
}
NODES = {"125M": 1, "350M": 1, "1.3B": 2, "2.7B": 2, "6B": 4, "13B": 8, "22B": 16, "175B": 64, "530B": 140, "1T": 128}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_config_parses_and_has_the_paper_s_number_of_parameters(path: Path) -> None:
    config = load_config(path)
    if path.stem == "quickstart":
        assert data_parallel_size(config, 8) == 2
        return
    billions, tolerance = PAPERS[path.stem]
    assert parameter_count(config.model) / 1e9 == pytest.approx(billions, rel=tolerance)
    assert data_parallel_size(config, 8 * NODES[path.stem]) >= 1
    assert f"// For {NODES[path.stem]} node" in path.read_text()


def test_no_shipped_size_is_missing() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == {*PAPERS, "quickstart"}


def test_formula_is_twelve_h_squared_and_the_rest() -> None:
    model = ModelConfig(n_layer=24, n_embd=2304, n_head=24, n_positions=2048, vocab_size=51200)
    layers, h = 24, 2304
    expected = 12 * layers * h**2 * (1 + 13 / (12 * h) + (51200 + 2048) / (12 * layers * h)) + 2 * h  # eq. 2, and the last norm
    assert parameter_count(model) == pytest.approx(expected, rel=1e-12)


def test_formula_equals_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    model = ModelConfig(n_layer=3, n_embd=24, n_head=4, n_positions=20, vocab_size=101, ffn_hidden=70)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=101, n_positions=20, n_embd=24, n_layer=3, n_head=4, n_inner=70)
    )
    assert parameter_count(model) == theirs.num_parameters()
