"""Texts from fixed prompts are those of the full model, under every layout, and are logged at each evaluation."""

from pathlib import Path

import pytest
from support.encoder_decoder import t5_config
from support.pool import Pool
from support.runs import Tree, corpus, create_engine, full_model, run_trainer, tiny_config
from support.texts import expected_greedy

from megagpt.config import Config
from megagpt.errors import ConfigError
from megagpt.inference.beam_search import BeamSearch, search
from megagpt.training.samples import SampleTexts

PROMPTS = ["abc", "a much longer one", ""]
LAYOUTS: dict[str, tuple[int, Tree]] = {
    "1 process": (1, {}),
    "tensor 2 x pipeline 2 x data 2": (8, {"parallel": {"tensor": 2, "pipeline": 2}, "zero": {"stage": 2}}),
    "sequence parallel, context 2": (4, {"parallel": {"tensor": 2, "context": 2, "sequence_parallel": True}}),
    "zbv": (2, {"parallel": {"pipeline": 2, "schedule": "zbv"}}),
}


def config_of(**sections: Tree) -> Config:
    """A model whose context holds the end of the longest prompt only."""
    return tiny_config(
        model={"vocab_size": 257, "n_positions": 16, "init_std": 0.5, "tie_embeddings": False},
        evaluation={"sample_prompts": PROMPTS, "sample_tokens": 6},
        data={"tokenizer": "byte"},
        **sections,
    )


def texts_of(config: Config) -> list[Tree]:
    engine = create_engine(config)
    texts = SampleTexts(engine).texts()
    engine.close()
    return texts


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_most_likely_tokens_of_the_full_model(name: str, ranks: Pool) -> None:
    world, sections = LAYOUTS[name]
    model = full_model(config_of()).eval()
    expected = []
    for prompt in PROMPTS:
        tokens = expected_greedy(model, list(prompt.encode())[-10:] or [256], 6)
        new = tokens[: tokens.index(256)] if 256 in tokens else tokens
        expected.append({"prompt": prompt, "text": bytes(new).decode(errors="replace")})
    assert ranks.run(world, texts_of, config_of(**sections)) == [expected] * world


@pytest.mark.parametrize("name", ["1 process", "tensor 2 x pipeline 2 x data 2", "sequence parallel, context 2"])
def test_with_an_encoder_the_texts_are_the_targets_of_greedy_search(name: str, ranks: Pool) -> None:
    world, sections = LAYOUTS[name]
    keys: Tree = {"vocab_size": 257, "init_std": 0.5, "tie_embeddings": False}
    evaluation: Tree = {"sample_prompts": PROMPTS, "sample_tokens": 6}
    config = t5_config(model=keys, evaluation=evaluation, data={"tokenizer": "byte"}, **sections)
    sources = [[*prompt.encode()[:23], 256] for prompt in PROMPTS]
    targets = search(full_model(config).eval(), sources, BeamSearch(max_tokens=6), {256})
    written = [bytes(token for token in target.tokens if token != 256).decode(errors="replace") for target in targets]
    expected = [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, written, strict=True)]
    assert ranks.run(world, texts_of, config) == [expected] * world


def test_texts_are_logged_at_each_evaluation_and_change_no_step(
    ranks: Pool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a set of validation data of its own for each name: each has the loss that it has alone."""
    for name in ("train", "web", "code"):
        (tmp_path / name).mkdir()
    paths = {name: corpus(tmp_path / name, documents) for name, documents in (("train", 60), ("web", 20), ("code", 30))}

    def records(valid: object, prompts: list[str]) -> list[Tree]:
        config = tiny_config(
            data={"train": paths["train"], "valid": valid, "tokenizer": "byte"},
            model={"vocab_size": 257},
            parallel={"tensor": 2},
            training={"steps": 4, "global_batch_size": 8},
            evaluation={"interval": 2, "sample_prompts": prompts, "sample_tokens": 4},
            logging={"interval": 1, "metrics_file": str(tmp_path / "metrics.jsonl")},
        )
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        result: list[Tree] = ranks.run(2, run_trainer, config)[0]["records"]
        return result

    table = records({"web": paths["web"], "code": {paths["code"]: 1.0}}, ["ab", "c"])
    assert [record["step"] for record in table if "samples" in record] == [2, 4]
    assert all([sample["prompt"] for sample in record["samples"]] == ["ab", "c"] for record in table if "samples" in record)
    for name in ("web", "code"):
        alone = records(paths[name], [])
        assert not any("samples" in record for record in alone)
        for key in ("loss", "perplexity"):
            losses = [record[f"eval_{key}"] for record in alone if f"eval_{key}" in record]
            assert len(losses) == 2
            assert [record[f"eval_{name}_{key}"] for record in table if f"eval_{name}_{key}" in record] == losses
        assert [r["loss"] for r in table if "loss" in r] == [r["loss"] for r in alone if "loss" in r]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"tokenizer": None}}, "evaluation.sample_prompts: needs data.tokenizer"),
        ({"zero": {"stage": 3}}, "evaluation.sample_prompts: the output layer's weights"),
        ({"evaluation": {"sample_prompts": ["a"], "sample_tokens": 16}}, "evaluation.sample_tokens: 16 leaves no room"),
        ({"data": {"train": "a", "tokenizer": "byte", "valid": {"web": {}}}}, "data.valid.web: needs at least one prefix"),
        ({"data": {"train": "a", "tokenizer": "byte", "valid": {"a b": "x"}}}, "data.valid.a b"),
        ({"data": {"train": "a", "tokenizer": "byte", "valid": {"web": "x", "code": 0.5}}}, "data.valid.web"),
    ],
)
def test_settings_that_cannot_work_are_refused(sections: Tree, message: str) -> None:
    evaluation = sections.pop("evaluation", {"sample_prompts": ["a"], "sample_tokens": 4})
    data = sections.pop("data", {"train": "a", "tokenizer": "byte"})
    with pytest.raises(ConfigError) as error:
        tiny_config(evaluation=evaluation, data=data, **sections)
    assert message in str(error.value)
