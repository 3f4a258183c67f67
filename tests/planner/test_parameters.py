"""The number of parameters, counted on the modules, equals Hugging Face's GPT-2, a published formula and the papers' sizes."""

from pathlib import Path

import pytest
from support.runs import Tree, tiny_config

from megagpt.config import data_parallel_size, load_config
from megagpt.planner.parameters import parameter_count, parameters_by_group

CONFIGS = Path(__file__).parents[2] / "configs"
PAPERS = {  # billions of parameters as printed, and the relative difference of the printed number from its own shape
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
def test_a_shipped_config_has_its_paper_s_number_of_parameters_and_the_layout_that_it_names(path: Path) -> None:
    config = load_config(path)
    if path.stem == "quickstart":
        assert data_parallel_size(config, 8) == 2
        return
    billions, tolerance = PAPERS[path.stem]
    assert parameter_count(config) / 1e9 == pytest.approx(billions, rel=tolerance)
    nodes, parallel = NODES[path.stem], config.parallel
    layout = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {data_parallel_size(config, 8 * nodes)}"
    assert f"// Layout for {nodes} node{'s' if nodes > 1 else ''} of 8 GPUs: {layout}." in path.read_text()


def test_every_shipped_size_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == {*PAPERS, "quickstart"}


def test_the_count_is_twelve_h_squared_per_layer_and_the_rest_of_the_published_formula() -> None:
    """Narayanan et al., arXiv 2104.04473, equation 2, and the final norm."""
    layers, h, s, v = 24, 2304, 2048, 51200
    config = tiny_config(model={"n_layer": layers, "n_embd": h, "n_head": 24, "n_positions": s, "vocab_size": v})
    expected = 12 * layers * h**2 * (1 + 13 / (12 * h) + (v + s) / (12 * layers * h)) + 2 * h
    assert parameter_count(config) == pytest.approx(expected, rel=1e-12)


def test_the_count_equals_hugging_face_s() -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"n_layer": 3, "n_embd": 24, "n_head": 4, "n_positions": 20, "vocab_size": 101, "ffn_hidden": 70}
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=101, n_positions=20, n_embd=24, n_layer=3, n_head=4, n_inner=70)
    )
    assert parameter_count(tiny_config(model=shape)) == theirs.num_parameters()


@pytest.mark.parametrize("model", [{}, {"ffn_hidden": 70}, {"tie_embeddings": False}])
def test_the_groups_have_the_sizes_of_their_matrices_without_padding(model: Tree) -> None:
    config = tiny_config(model=model)
    layers, h, vocab_size, f = 4, 32, 61, config.model.ffn_hidden_size
    expected = {
        "embedding.token": vocab_size * h,
        "embedding.position": 16 * h,
        "attention_norm": layers * 2 * h,
        "attention.qkv": layers * (3 * h * h + 3 * h),
        "attention.proj": layers * (h * h + h),
        "mlp_norm": layers * 2 * h,
        "mlp.up": layers * (h * f + f),
        "mlp.down": layers * (f * h + h),
        "final_norm": 2 * h,
    }
    if not config.model.tie_embeddings:
        expected["head"] = vocab_size * h
    assert parameters_by_group(config) == expected
    assert parameter_count(config) == sum(expected.values())
