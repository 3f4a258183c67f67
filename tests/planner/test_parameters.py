"""The number of parameters, counted on the modules, equals Hugging Face's GPT-2, a published formula and the papers' sizes."""

from pathlib import Path

import pytest
import torch
from support.runs import Tree, tiny_config

from megagpt.config import data_parallel_size, load_config
from megagpt.hugging_face.model_keys import MODEL_KEYS
from megagpt.planner.memory import peak_memory
from megagpt.planner.parameters import parameter_count, parameters_by_group
from megagpt.planner.strategy import Strategy

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
FAMILIES = {  # of the safetensors files on the Hugging Face hub; pythia: arXiv 2304.01373, table 1
    "llama-3.2-1B": 1_235_814_400,
    "llama-3.1-8B": 8_030_261_248,
    "llama-3.1-70B": 70_553_706_496,
    "qwen3-8B": 8_190_735_360,
    "pythia-1.4B": 1_414_647_808,
    "pythia-12B": 11_846_072_320,
    "olmo2-7B": 7_298_617_344,
}
T5 = {  # of the safetensors files, with the output layer, which transformers 5 counts once with the embedding
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-3B": 2_849_757_184,
    "t5-v1.1-11B": 11_135_332_352,
}
GPU_GIB = 80
SPARE = 0.8
"""Share of a GPU for what the planner predicts; the rest is for the CUDA context, NCCL and the allocator."""
NODES = {
    "125M": 1,
    "350M": 1,
    "1.3B": 2,
    "2.7B": 2,
    "6B": 4,
    "13B": 8,
    "22B": 16,
    "175B": 64,
    "530B": 140,
    "1T": 128,
    "llama-3.2-1B": 1,
    "llama-3.1-8B": 8,
    "llama-3.1-70B": 64,
    "qwen3-8B": 8,
    "pythia-1.4B": 4,
    "pythia-12B": 8,
    "olmo2-7B": 8,
    "t5-v1.1-base": 1,
    "t5-v1.1-large": 1,
    "t5-v1.1-3B": 2,
    "t5-v1.1-11B": 8,
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_config_has_its_paper_s_number_of_parameters_and_the_layout_that_it_names(path: Path) -> None:
    config = load_config(path)
    if path.stem in ("quickstart", "quickstart_t5"):
        assert data_parallel_size(config, 4 if config.model.encoder_layers else 8) == 2
        return
    if path.stem in FAMILIES | T5:
        assert parameter_count(config) == (FAMILIES | T5)[path.stem]
    else:
        billions, tolerance = PAPERS[path.stem]
        assert parameter_count(config) / 1e9 == pytest.approx(billions, rel=tolerance)
    nodes, parallel = NODES[path.stem], config.parallel
    layout = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {data_parallel_size(config, 8 * nodes)}"
    assert f"// Layout for {nodes} node{'s' if nodes > 1 else ''} of 8 GPUs: {layout}." in path.read_text()


def test_every_shipped_size_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == {*PAPERS, *FAMILIES, *T5, "quickstart", "quickstart_t5"}


@pytest.mark.parametrize("name", NODES)
def test_the_layout_of_a_shipped_config_fits_its_gpus(name: str) -> None:
    config = load_config(name)
    assert peak_memory(config, Strategy.of(config, 8 * NODES[name])).total / 2**30 < SPARE * GPU_GIB
    assert config.parallel.tensor <= 8  # within a node


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shipped_family_is_the_model_of_transformers_with_the_same_parameters(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = load_config(name).model
    family = next(kind for kind, keys in MODEL_KEYS.items() if not keys.missing(model))
    config = transformers.AutoConfig.for_model(family, **MODEL_KEYS[family].from_model(model))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert theirs.num_parameters() == FAMILIES[name]
    assert family == {"pythia": "gpt_neox"}.get(name.partition("-")[0], name.partition("-")[0])


@pytest.mark.parametrize("name", T5)
def test_a_shipped_t5_is_the_model_of_transformers_with_the_same_parameters(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = load_config(name).model
    assert MODEL_KEYS["t5"].missing(model) == {}
    with torch.device("meta"):
        theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**MODEL_KEYS["t5"].from_model(model)))
    assert theirs.num_parameters() + theirs.shared.weight.numel() == T5[name]


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


def test_the_groups_of_a_llama_have_the_sizes_of_their_matrices() -> None:
    model = {
        "n_kv_head": 2,
        "head_dim": 12,
        "ffn_hidden": 48,
        "gated_mlp": True,
        "norm": "rmsnorm",
        "qk_norm": "head",
        "position_embedding": "rotary",
        "tie_embeddings": False,
        "qkv_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
    }
    layers, h, f, width = 4, 32, 48, 4 * 12
    assert parameters_by_group(tiny_config(model=model)) == {
        "embedding.token": 61 * h,
        "attention_norm": layers * h,
        "attention.q": layers * h * width,
        "attention.kv": layers * h * 2 * 2 * 12,
        "attention.query_norm": layers * 12,
        "attention.key_norm": layers * 12,
        "attention.proj": layers * width * h,
        "mlp_norm": layers * h,
        "mlp.gate_up": layers * 2 * h * f,
        "mlp.down": layers * f * h,
        "final_norm": h,
        "head": 61 * h,
    }
