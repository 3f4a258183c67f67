"""A model of transformers becomes a checkpoint that computes the same, and comes back bit for bit."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.exhaustive import EXHAUSTIVE
from support.families import CASES, random_model
from support.runs import Tree, tiny_config
from support.texts import continued, greedy

from megagpt.checkpoint.load import CheckpointReader
from megagpt.config import Config
from megagpt.config.compare import model_differences
from megagpt.errors import CheckpointError, ConfigError
from megagpt.hugging_face.export_model import Export
from megagpt.hugging_face.folder import ModelFolder
from megagpt.hugging_face.import_model import Import
from megagpt.hugging_face.peak_memory import PeakMemory
from megagpt.inference.load import load_model
from megagpt.inference.sampling import Sampling
from megagpt.model.gpt import GPTChunk
from megagpt.progress import NoProgress

transformers = pytest.importorskip("transformers")

SHARED = Path(__file__).parents[3] / "shared" / "data" / "stories260K"
LARGE = 10**9
UNIMPORTANT = ("dtype", "_name_or_path", "architectures", "attn_implementation", "transformers_version")
"""Keys of a config of transformers that say nothing about the model."""


class Trip(NamedTuple):
    """A model of transformers, the checkpoint made of it, and the folder made of the checkpoint."""

    theirs: Any
    ours: GPTChunk
    config: Config
    original: Path
    exported: Path
    case: str


def import_folder(source: Path, output: Path, vocab_size: int | None = None) -> Path:
    return Import(ModelFolder(source), vocab_size).write(output, PeakMemory(), NoProgress()).folder


def export_folder(checkpoint: Path, output: Path, max_file_bytes: int = LARGE, **options: Any) -> Path:
    plan = Export(CheckpointReader(checkpoint), **options)
    return plan.write(output, max_file_bytes, False, PeakMemory(), NoProgress()).folder


@pytest.fixture(scope="module", params=CASES)
def trip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trip:
    folder = tmp_path_factory.mktemp("trip")
    theirs = random_model(request.param)
    theirs.save_pretrained(folder / "original")
    checkpoint = import_folder(folder / "original", folder / "checkpoint")
    exported = export_folder(checkpoint, folder / "exported")
    ours, config = load_model(checkpoint)
    return Trip(theirs, ours, config, folder / "original", exported, request.param)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny LLaMA."""
    folder = tmp_path_factory.mktemp("small") / "model"
    random_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """A copy of it to alter."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in small.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_the_imported_config_is_the_one_that_the_model_was_made_with(trip: Trip) -> None:
    expected = tiny_config(model={**CASES[trip.case][0], "n_positions": trip.config.model.n_positions})
    assert model_differences(expected.model, trip.config.model) == []


def test_the_imported_model_has_the_logits_of_the_original(trip: Trip) -> None:
    """fp32; the same sums in another order: 2e-5 relative to the largest logit."""
    tokens = torch.randint(0, 61, (2, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = trip.theirs(tokens).logits
        torch.testing.assert_close(trip.ours.logits(tokens), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_every_tensor_comes_back_bit_for_bit(trip: Trip) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (trip.original, trip.exported))
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert values.dtype == after[name].dtype and torch.equal(values, after[name]), name


def test_transformers_loads_the_exported_folder_and_generates_what_megagpt_generates(trip: Trip) -> None:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        trip.exported, attn_implementation="eager", output_loading_info=True
    )
    assert type(model) is type(trip.theirs)
    assert {name: list(problems) for name, problems in report.items() if problems} == {}
    before, after = trip.theirs.config.to_dict(), model.config.to_dict()
    assert {
        key: (before[key], after.get(key)) for key in before if key not in UNIMPORTANT and before[key] != after.get(key)
    } == {}
    prompt = [3, 1, 4, 1, 5]
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert greedy(trip.ours, prompt, 9) == theirs[0, len(prompt) :].tolist()


def test_dtypes_survive(copy: Path, tmp_path: Path) -> None:
    tensors = {name: values.bfloat16() for name, values in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    checkpoint = import_folder(copy, tmp_path / "checkpoint")
    back = load_file(export_folder(checkpoint, tmp_path / "back") / "model.safetensors")
    assert all(torch.equal(back[name], values) for name, values in tensors.items())
    halves = load_file(export_folder(checkpoint, tmp_path / "halves", dtype="fp16") / "model.safetensors")
    assert all(torch.equal(halves[name], values.half()) for name, values in tensors.items())
    assert transformers.AutoConfig.from_pretrained(tmp_path / "halves").dtype == torch.float16


def test_a_model_in_several_files_goes_both_ways(small: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(small)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    checkpoint = import_folder(tmp_path / "sharded", tmp_path / "checkpoint")
    exported = export_folder(checkpoint, tmp_path / "exported", max_file_bytes=10_000)
    files = sorted(exported.glob("model-*.safetensors"))
    assert len(files) > 3 and not (exported / "model.safetensors").exists()
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 10_000 for file in files)
    back = transformers.AutoModelForCausalLM.from_pretrained(exported)
    for name, values in model.state_dict().items():
        assert torch.equal(values, back.state_dict()[name]), name


def test_a_base_model_and_stored_buffers_are_accepted(tmp_path: Path) -> None:
    """GPT-2 itself is stored without the prefix "transformer." and with its causal masks."""
    theirs = random_model("gpt2")
    theirs.transformer.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    assert "wte.weight" in tensors
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    ours, _ = load_model(import_folder(tmp_path / "base", tmp_path / "checkpoint"))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [50, 61, 70])
def test_a_resized_vocabulary_keeps_the_old_rows_and_sets_new_ones_to_their_mean(
    size: int, small: Path, tmp_path: Path
) -> None:
    ours, config = load_model(import_folder(small, tmp_path / "checkpoint", size))
    before = load_file(small / "model.safetensors")
    assert config.model.vocab_size == size
    for weight, name in ((ours.tokens.weight, "model.embed_tokens.weight"), (ours.loss.weight, "lm_head.weight")):
        kept = min(size, 61)
        assert torch.equal(weight[:kept], before[name][:kept])
        torch.testing.assert_close(weight[61:size], before[name].mean(0).expand(max(0, size - 61), -1))


def test_one_parameter_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """64 layers of 1 MB each: all of them would be 64 times the largest parameter."""
    sizes = {**CASES["llama"][2], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 64}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    theirs.save_pretrained(tmp_path / "model")
    del theirs
    plan = Import(ModelFolder(tmp_path / "model"))
    imported, exported = PeakMemory(), PeakMemory()
    checkpoint = plan.write(tmp_path / "checkpoint", imported, NoProgress()).folder
    Export(CheckpointReader(checkpoint)).write(tmp_path / "back", LARGE, False, exported, NoProgress())
    assert plan.total_bytes > 50 * plan.largest_bytes
    for memory in (imported, exported):
        assert memory.bytes is not None and memory.bytes < 8 * plan.largest_bytes


WRONG_CONFIGS: dict[str, tuple[Tree, str]] = {
    "an unknown key": ({"clip_qkv": 8.0}, "clip_qkv: 8.0: expected a key with a counterpart"),
    "another family": ({"model_type": "lama"}, "did you mean 'llama'?"),
    "another scaling": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_parameters.rope_type",
    ),
    "an attention factor": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "attention_factor": 2.0}},
        "rope_parameters.attention_factor",
    ),
    "an activation": ({"hidden_act": "mish"}, 'hidden_act: "mish": expected gelu'),
    "a text for a number": ({"hidden_size": "32"}, "model.n_embd"),
    "a list for a table": ({"rope_parameters": [1]}, "another type"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "model.n_kv_head"),
    "another width": ({"intermediate_size": 40}, "do not have the shapes that config.json implies: model.layers.0.mlp.gate"),
    "more layers": ({"num_hidden_layers": 5}, "tensors are missing that config.json implies: model.layers.4."),
    "fewer layers": ({"num_hidden_layers": 3}, "has tensors that LlamaForCausalLM does not have: model.layers.3."),
    "no vocabulary": ({"vocab_size": None}, "vocab_size: null: expected a value; the key is required"),
    "a quantized model": ({"quantization_config": {"bits": 4}}, "quantization_config"),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_config_without_a_counterpart_is_refused_with_its_key(name: str, copy: Path, tmp_path: Path) -> None:
    keys, message = WRONG_CONFIGS[name]
    change_config(copy, **keys)
    with pytest.raises((ConfigError, CheckpointError)) as error:
        Import(ModelFolder(copy))
    assert message in str(error.value) and str(copy) in str(error.value) and "\n" not in str(error.value)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([10**12, -1.5, 0.5, float("nan"), float("inf"), "", "32", [], [1], {}, {"a": 1}, ["full_attention"] * 4]),
)


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2", "gpt_neox", "gpt2"])
@settings(max_examples=120 if EXHAUSTIVE else 50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_of_any_key_is_accepted_or_refused_in_one_sentence(
    case: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"any {case}"
    if not folder.exists():
        random_model(case).save_pretrained(folder)
        (folder / "original.json").write_bytes((folder / "config.json").read_bytes())
    config = json.loads((folder / "original.json").read_text())
    for key in data.draw(st.lists(st.sampled_from([*config, "rope_scaling", "layer_types", "new"]), min_size=1, max_size=2)):
        config[key] = data.draw(VALUES)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        Import(ModelFolder(folder))
    except (ConfigError, CheckpointError) as error:
        note(str(error))
        assert str(folder) in str(error)


def test_a_key_with_the_value_null_counts_as_absent(copy: Path) -> None:
    change_config(copy, clip_qkv=None)
    Import(ModelFolder(copy))


def test_files_that_are_no_model_are_refused(copy: Path, tmp_path: Path) -> None:
    def error() -> str:
        with pytest.raises((ConfigError, CheckpointError)) as found:
            Import(ModelFolder(copy))
        return str(found.value)

    save_file({"x": torch.zeros(2, dtype=torch.int8)}, copy / "model.safetensors")
    assert "tensors are missing" in error()
    (copy / "model.safetensors").write_bytes(b"no header")
    assert "model.safetensors: cannot be read" in error()
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in error()
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}')
    assert "weight_map: expected" in error()
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    assert "missing: gone.safetensors" in error()
    (copy / "config.json").write_text("[]")
    assert "expected one JSON object" in error()
    (copy / "config.json").unlink()
    assert "config.json: No such file" in error()
    copy = tmp_path / "nowhere"
    assert "no such folder" in error()


def test_a_quantized_tensor_is_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.norm.weight: dtype I8; expected F32, BF16, F16"):
        Import(ModelFolder(copy))


def test_weights_that_are_not_finite_are_refused_by_name(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.norm.weight: 1 of 32 values are NaN or infinite"):
        import_folder(copy, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint" / "latest").exists()


def test_nothing_is_overwritten(small: Path, tmp_path: Path) -> None:
    output = tmp_path / "checkpoint"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="has notes.txt already"):
        import_folder(small, output)
    (output / "notes.txt").unlink()
    (output / "step_00000000.writing-1234").mkdir()  # left by an interrupted import
    checkpoint = import_folder(small, output)
    assert {path.name for path in output.iterdir()} == {"latest", "model.json", "step_00000000"}
    with pytest.raises(ConfigError, match="has latest, model.json, step_00000000 already"):
        import_folder(small, output)
    with pytest.raises(ConfigError, match="is in the checkpoint's folder"):
        export_folder(checkpoint, checkpoint / "model")
    exported = export_folder(checkpoint, tmp_path / "exported")
    with pytest.raises(ConfigError, match="exists already"):
        export_folder(checkpoint, exported)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="no Hugging Face model"):
        Export(CheckpointReader(checkpoint)).write(tmp_path / "other", LARGE, True, PeakMemory(), NoProgress())
    (exported / "old").touch()
    Export(CheckpointReader(checkpoint)).write(exported, LARGE, True, PeakMemory(), NoProgress())
    assert not (exported / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "exported", "other"]


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")
class TestStories260K:
    """A real trained LLaMA: its logits in transformers, and the text that its author published."""

    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> GPTChunk:
        return load_model(import_folder(SHARED, tmp_path_factory.mktemp("stories") / "checkpoint"))[0]

    def test_the_reference_logits_are_reproduced(self, model: GPTChunk) -> None:
        reference = load_file(SHARED / "reference_logits.safetensors")
        ids, logits = (next(t for t in reference.values() if t.dim() == dims) for dims in (1, 2))
        with torch.no_grad():
            ours = model.logits(ids[None].long())[0]
        torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5 * logits.abs().max().item())

    def test_the_published_greedy_text_is_reproduced(self, model: GPTChunk) -> None:
        pieces = json.loads((SHARED / "tok512.json").read_text())["pieces"]
        expected = (SHARED / "expected_greedy.txt").read_text().strip()
        tokens = continued(model, [[1]], Sampling(260, temperature=0), end={1})[0]
        text = "".join(pieces[token] for token in tokens).replace("<0x0A>", "\n").strip()
        assert len(expected) > 500 and text.startswith(expected)

    def test_the_exported_folder_has_the_tensors_of_the_original(self, tmp_path: Path) -> None:
        checkpoint = import_folder(SHARED, tmp_path / "checkpoint")
        back = load_file(export_folder(checkpoint, tmp_path / "back") / "model.safetensors")
        original = load_file(SHARED / "model.safetensors")
        assert back.keys() == original.keys() and all(torch.equal(back[name], original[name]) for name in original)
