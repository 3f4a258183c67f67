"""T5 v1.0 and v1.1 of transformers become checkpoints that compute the same, and come back bit for bit."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.encoder_decoder import hugging_face_t5
from support.runs import parameters_by_name

from megagpt.checkpoint.load import CheckpointReader
from megagpt.commands.convert_checkpoint import main as convert
from megagpt.errors import CheckpointError
from megagpt.hugging_face.export_model import Export
from megagpt.hugging_face.folder import ModelFolder
from megagpt.hugging_face.import_model import Import
from megagpt.hugging_face.model_keys import MODEL_KEYS
from megagpt.hugging_face.peak_memory import PeakMemory
from megagpt.inference.load import load_model
from megagpt.labels import IGNORED
from megagpt.model.encoder_decoder import EncoderDecoderChunk
from megagpt.model.forward_context import MicroBatch
from megagpt.progress import NoProgress

transformers = pytest.importorskip("transformers")


class Trip(NamedTuple):
    """A model of transformers, the checkpoint made of it, and the folder made of the checkpoint."""

    theirs: Any
    ours: EncoderDecoderChunk
    original: Path
    checkpoint: Path
    exported: Path


@pytest.fixture(scope="module", params=["v1.0", "v1.1"])
def trip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trip:
    folder = tmp_path_factory.mktemp("t5")
    theirs = hugging_face_t5(request.param)
    theirs.save_pretrained(folder / "original")
    source = Import(ModelFolder(folder / "original"))
    checkpoint = source.write(folder / "checkpoint", PeakMemory(), NoProgress()).folder
    Export(CheckpointReader(checkpoint)).write(folder / "exported", 10**9, False, PeakMemory(), NoProgress())
    ours, _ = load_model(checkpoint)
    assert isinstance(ours, EncoderDecoderChunk)
    return Trip(theirs, ours, folder / "original", checkpoint, folder / "exported")


def batch() -> MicroBatch:
    """Return a micro-batch with padding in the source and ignored labels."""
    generator = torch.Generator().manual_seed(3)
    source, tokens, labels = (torch.randint(0, 61, (3, length), generator=generator) for length in (25, 14, 14))
    labels[1, 9:] = IGNORED
    return MicroBatch(tokens, labels, source=source, source_lengths=torch.tensor([25, 3, 14]))


def theirs_of(trip: Trip, batch: MicroBatch) -> Any:
    assert batch.source is not None and batch.source_lengths is not None
    mask = (torch.arange(batch.source.shape[1]) < batch.source_lengths.unsqueeze(1)).long()
    return trip.theirs(input_ids=batch.source, attention_mask=mask, decoder_input_ids=batch.tokens, labels=batch.labels)


def test_logits_loss_and_gradients_are_those_of_the_original(trip: Trip) -> None:
    """fp32; the same sums in another order: 1e-4 of the largest number, as scores that are not scaled amplify rounding."""
    inputs = batch()
    expected = theirs_of(trip, inputs)
    logits = trip.ours.logits(inputs.source, inputs.tokens, inputs.source_lengths)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4 * expected.logits.abs().max().item())
    ours = trip.ours.requires_grad_()
    loss = ours(None, inputs) / (inputs.labels != IGNORED).sum()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    loss.backward()
    expected.loss.backward()
    named = {name: parameter.grad for name, parameter in trip.theirs.named_parameters()}
    found = parameters_by_name(ours)
    pairs = {
        "embedding.token.weight": "shared.weight",
        "encoder.final_norm.weight": "encoder.final_layer_norm.weight",
        "layers.1.mlp.down.weight": "decoder.block.1.layer.2.DenseReluDense.wo.weight",
        "layers.0.cross_attention.q.weight": "decoder.block.0.layer.1.EncDecAttention.q.weight",
        "encoder.layers.2.attention.proj.weight": "encoder.block.2.layer.0.SelfAttention.o.weight",
    }
    for mine, other in pairs.items():
        gradient, wanted = found[mine].grad, named[other]
        assert gradient is not None
        gradient = gradient[: len(wanted)]  # the embedding has padding
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    for stack in ("encoder", "decoder"):
        bias = found[f"{stack}.relative_bias.weight"].grad
        wanted = named[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        assert bias is not None
        torch.testing.assert_close(bias.view(4, -1).t(), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def test_every_tensor_comes_back_bit_for_bit_and_transformers_loads_the_folder(trip: Trip) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (trip.original, trip.exported))
    assert before.keys() == after.keys()
    assert all(torch.equal(values, after[name]) for name, values in before.items())
    model, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(trip.exported, output_loading_info=True)
    assert type(model) is type(trip.theirs)
    assert {name: list(problems) for name, problems in report.items() if problems} == {}
    inputs = batch()
    with torch.no_grad():
        loaded = trip._replace(theirs=model.eval())
        assert torch.equal(theirs_of(loaded, inputs).logits, theirs_of(trip, inputs).logits)


def test_the_converter_checks_the_logits_of_both_sides(trip: Trip, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(["to-hf", str(trip.checkpoint), "--output", str(tmp_path / "model"), "--check"]) == 0
    assert "checked with transformers: logits" in capsys.readouterr().out


def test_copies_of_the_embedding_in_a_file_are_accepted_and_other_tensors_are_not(trip: Trip, tmp_path: Path) -> None:
    """The first releases stored the embedding three times."""
    tensors = load_file(trip.original / "model.safetensors")
    (tmp_path / "config.json").write_text((trip.original / "config.json").read_text())
    copies = {f"{stack}.embed_tokens.weight": tensors["shared.weight"].clone() for stack in ("encoder", "decoder")}
    save_file({**tensors, **copies}, tmp_path / "model.safetensors", {"format": "pt"})
    assert Import(ModelFolder(tmp_path)).config.model.encoder_layers == 3
    save_file({**tensors, "decoder.more": copies["encoder.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="decoder.more"):
        Import(ModelFolder(tmp_path))


PUBLISHED = {  # of the folders on the Hugging Face hub
    "t5-small": ({"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "d_kv": 64, "n_positions": 512}, False),
    "t5-v1_1-base": (
        {
            "d_model": 768,
            "d_ff": 2048,
            "num_layers": 12,
            "num_decoder_layers": 12,
            "num_heads": 12,
            "tie_word_embeddings": False,
        },
        True,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_their_meaning(name: str) -> None:
    keys, is_new = PUBLISHED[name]
    theirs = {**keys, "vocab_size": 32128, "model_type": "t5", "feed_forward_proj": "gated-gelu" if is_new else "relu"}
    model = MODEL_KEYS["t5"].to_model(json.loads(json.dumps(theirs)))
    assert model["tie_embeddings"] is not is_new and model["gated_mlp"] is is_new
    assert model["output_scale"] == (1.0 if is_new else 512**-0.5)
    assert model["encoder_layers"] == model["n_layer"] == keys["num_layers"]
