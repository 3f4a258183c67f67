"""One process generates from what many trained: the same weights, and the cache's tokens are those of the whole text."""

from pathlib import Path

import pytest
import torch
from support.pool import Pool
from support.runs import corpus, run_trainer, tiny_config, whole_weights

from megagpt.checkpoint.format import resolve_checkpoint
from megagpt.commands import generate_text
from megagpt.errors import ConfigError
from megagpt.inference.generate import generate, load_model
from megagpt.parallel.shard import shard_of


@pytest.fixture(scope="module")
def trained(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of tensor 2 x pipeline 2 x data 2 with bytes for tokens, and its weights."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(
        model={"vocab_size": 257},
        data={"train": corpus(folder, vocab_size=257), "tokenizer": "byte"},
        parallel={"tensor": 2, "pipeline": 2},
        training={"steps": 2, "global_batch_size": 8},
        checkpoint={"dir": str(folder / "checkpoints")},
    )
    return folder / "checkpoints", whole_weights(ranks.run(8, run_trainer, config))


def test_the_model_of_any_layout_loads_on_one_process_bit_for_bit(trained: tuple[Path, dict[str, torch.Tensor]]) -> None:
    model, _ = load_model(resolve_checkpoint(trained[0]))
    for parameter in model.parameters():
        name = shard_of(parameter).name
        assert torch.equal(parameter[: len(trained[1][name])], trained[1][name]), name


def test_likeliest_tokens_are_those_of_the_whole_text_without_a_cache(trained: tuple[Path, dict[str, torch.Tensor]]) -> None:
    model, _ = load_model(resolve_checkpoint(trained[0]))
    tokens = [5, 7, 11]
    found = list(generate(model, tokens, 8, temperature=0, top_k=None, seed=0, end=None))
    for token in found:
        with torch.no_grad():
            assert int(model.logits(torch.tensor([tokens]))[0, -1].argmax()) == token
        tokens.append(token)
    assert len(list(generate(model, [1, 2], 100, 0, None, 0, None))) == 14  # to the last of 16 positions
    assert list(generate(model, [5, 7, 11], 8, 0, None, 0, end=found[0])) == []


def test_draws_depend_on_the_seed_alone_and_stay_among_the_top_k(trained: tuple[Path, dict[str, torch.Tensor]]) -> None:
    model, _ = load_model(resolve_checkpoint(trained[0]))

    def draw(seed: int, top_k: int | None) -> list[int]:
        return list(generate(model, [3], 10, 1.0, top_k, seed, None))

    assert draw(1, None) == draw(1, None) != draw(2, None)
    assert draw(1, 1) == draw(2, 1) == list(generate(model, [3], 10, 0, None, 0, None))


def test_the_command_prints_the_prompt_and_more(trained: tuple[Path, dict[str, torch.Tensor]], capsys) -> None:
    assert generate_text.main(["--checkpoint", str(trained[0]), "--prompt", "abc", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("abc")


def test_wrong_requests(trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys) -> None:
    model, _ = load_model(resolve_checkpoint(trained[0]))
    with pytest.raises(ConfigError, match="16 tokens; expected 1 to 15"):
        next(generate(model, [1] * 16, 1, 0, None, 0, None))
    assert generate_text.main(["--checkpoint", str(tmp_path), "--prompt", "a"]) == 2
    assert "no checkpoint here" in capsys.readouterr().err
