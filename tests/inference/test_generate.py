"""One process generates from a checkpoint of many ranks: the same weights, and the same tokens with and without the cache."""

import shutil
from pathlib import Path

import pytest
import torch
from support.pool import Pool
from support.runs import corpus, full_weights, run_trainer, tiny_config
from support.saved import flip_bit

from megagpt.checkpoint.format import resolve_checkpoint
from megagpt.commands import generate_text
from megagpt.errors import CheckpointError, ConfigError
from megagpt.inference.generate import generate, load_model
from megagpt.parallel.parameter import shard_of

Trained = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def trained(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A checkpoint of tensor 2 x pipeline 2 x data 2 whose tokens are bytes, and its weights."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(
        model={"vocab_size": 257},
        data={"train": corpus(folder, vocab_size=257), "tokenizer": "byte"},
        parallel={"tensor": 2, "pipeline": 2},
        training={"steps": 2, "global_batch_size": 8},
        checkpoint={"dir": str(folder / "checkpoints")},
    )
    return folder / "checkpoints", full_weights(ranks.run(8, run_trainer, config))


def test_a_model_of_any_layout_loads_in_one_process_bit_for_bit(trained: Trained) -> None:
    model, _ = load_model(resolve_checkpoint(trained[0]))
    for parameter in model.parameters():
        name = shard_of(parameter).name
        assert torch.equal(parameter[: len(trained[1][name])], trained[1][name]), name


def test_greedy_tokens_equal_those_of_the_full_text_without_a_cache(trained: Trained) -> None:
    model, _ = load_model(resolve_checkpoint(trained[0]))
    tokens = [5, 7, 11]
    generated = list(generate(model, tokens, 8, temperature=0, top_k=None, seed=0, end=None))
    for token in generated:
        with torch.no_grad():
            assert int(model.logits(torch.tensor([tokens]))[0, -1].argmax()) == token
        tokens.append(token)
    assert len(list(generate(model, [1, 2], 100, 0, None, 0, None))) == 14  # up to the last of 16 positions
    assert list(generate(model, [5, 7, 11], 8, 0, None, 0, end=generated[0])) == []


def test_samples_depend_only_on_the_seed_and_are_among_the_top_k(trained: Trained) -> None:
    model, _ = load_model(resolve_checkpoint(trained[0]))

    def sample(seed: int, top_k: int | None) -> list[int]:
        return list(generate(model, [3], 10, 1.0, top_k, seed, None))

    assert sample(1, None) == sample(1, None) != sample(2, None)
    assert sample(1, 1) == sample(2, 1) == list(generate(model, [3], 10, 0, None, 0, None))


def test_the_command_prints_the_prompt_and_its_continuation(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_text.main(["--checkpoint", str(trained[0]), "--prompt", "abc", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("abc")


def test_wrong_requests_are_refused_with_the_reason(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load_model(resolve_checkpoint(trained[0]))
    with pytest.raises(ConfigError, match="16 tokens; expected 1 to 15"):
        next(generate(model, [1] * 16, 1, 0, None, 0, None))
    assert generate_text.main(["--checkpoint", str(tmp_path), "--prompt", "a"]) == 2
    assert "no checkpoint here" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="0 tokens; expected 1 to 15"):
        next(generate(model, [], 1, 0, None, 0, None))
    for wrong in (["--temperature", "-1"], ["--max-tokens", "0"], ["--top-k", "0"]):
        assert generate_text.main(["--checkpoint", str(trained[0]), "--prompt", "a", *wrong]) == 2
        assert "--temperature must be 0 or more, --max-tokens and --top-k must be 1 or more" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(trained: Trained, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(resolve_checkpoint(trained[0]), tmp_path / "step_00000002"))
    flip_bit(next(checkpoint.glob("*.safetensors")))
    with pytest.raises(CheckpointError, match="its SHA-256 differs"):
        load_model(checkpoint)
