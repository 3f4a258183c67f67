"""Config files: what is accepted, what is refused, and the messages."""

import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from megagpt.config import Config, build_config, config_hash, data_parallel_size, load_config, to_json
from megagpt.config.flat import FLAT_KEYS
from megagpt.config.rules import OWNED_BY_MEGAGPT
from megagpt.errors import ConfigError

FLAT = Path(__file__).parents[1] / "fixtures" / "flat_gpt.json"
SMALL = {
    "model": {"n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 16},
    "training": {"steps": 10, "micro_batch_size": 2, "global_batch_size": 16},
}


def write(folder: Path, text: str) -> Path:
    path = folder / "run.json"
    path.write_text(text)
    return path


def with_keys(*assignments: str) -> dict:
    tree = json.loads(json.dumps(SMALL))
    for assignment in assignments:
        key, value = assignment.split("=", 1)
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = json.loads(value)
    return tree


def test_comments_and_trailing_commas(tmp_path: Path) -> None:
    text = json.dumps(SMALL)[:-1] + ', /* more */ "zero": {"stage": 2,}, // end\n}'
    assert load_config(write(tmp_path, text)).zero.stage == 2


def test_all_errors_are_listed_at_once_field_errors_and_broken_rules_alike() -> None:
    with pytest.raises(ConfigError) as error:
        build_config(with_keys("model.n_heads=4", 'model.activation="gelo"', "learning_rate=3", "parallel.tensor=3"))
    text = str(error.value)
    assert "problems" in text
    for part in (
        "model.n_heads: no such key; did you mean n_head?",
        "did you mean 'gelu'?",
        "learning_rate: no such key; did you mean optimizer.learning_rate?",
        "parallel.tensor: 3 does not divide model.n_head 4; valid tensor sizes: 1, 2, 4",
    ):
        assert part in text


@pytest.mark.parametrize(
    "assignments, message",
    [
        (["model.n_head=5"], "5 heads do not divide model.n_embd 32; valid: 1, 2, 4, 8, 16, 32"),
        (["parallel.tensor=3", "model.n_head=8"], "3 does not divide model.vocab_multiple 128"),
        (
            ["parallel.tensor=4", "model.ffn_hidden=42"],
            "4 does not divide model.ffn_hidden 42; valid tensor sizes: 1, 2, 3",
        ),
        (["parallel.sequence_parallel=true"], "parallel.tensor is 1"),
        (["parallel.sequence_parallel=true", "parallel.tensor=4", "model.n_positions=18"], "model.n_positions 18"),
        (["parallel.pipeline=5"], "5 stages for model.n_layer 4"),
        (["parallel.pipeline=4", 'parallel.schedule="zbv"'], "8 stages (4 ranks x 2 chunks) for model.n_layer 4"),
        (["parallel.pipeline=2", 'parallel.schedule="interleaved_1f1b"'], "expected 2 or more"),
        (
            ["parallel.pipeline=2", "parallel.virtual_stages=2"],
            "parallel.virtual_stages: 2 with parallel.schedule 1f1b; expected 1",
        ),
        (['parallel.schedule="zbv"', "zero.stage=3"], 'use parallel.schedule "1f1b"'),
        (["parallel.context=3"], "parallel.context: 3 x parallel.tensor 1 does not divide model.n_head 4"),
        (
            ["parallel.context=4", "model.n_positions=18"],
            "4 shards (with sequence parallelism) do not divide model.n_positions 18",
        ),
        (["zero.stage=3", "parallel.pipeline=2"], "use zero.stage 1 or 2"),
        (["zero.stage=0", 'zero.offload_optimizer="cpu"'], "zero.offload_optimizer: needs zero.stage 1, 2 or 3"),
        (['zero.offload_param="cpu"'], "zero.offload_param: needs zero.stage 3"),
        (['training.compile="maybe"'], "training.compile: \"maybe\": input should be 'auto', true or false"),
        (["zero.stage=3", "training.compile=true"], "training.compile: true needs zero.stage 0, 1 or 2"),
        (["training.micro_batch_size=3"], "3 does not divide training.global_batch_size 16"),
        (["evaluation.micro_batch_size=3"], "evaluation.micro_batch_size: 3 does not divide"),
        (["training.tokens=100"], "exactly one of steps, tokens and epochs, not steps and tokens"),
        (["training.steps=null"], "not none"),
        (['data.paths="a"'], 'data.split: required together with data.paths, for example "969,30,1"; set both'),
        (['data.split="1,2,3"'], "data.paths: required together with data.split; set both or neither"),
        (['data.paths="a"', 'data.split="1,2"'], "not three shares"),
        (['data.paths="a"', 'data.split="1,2,3"', 'data.train="b"'], "excludes data.train"),
        (['data.train={"a": -1}'], "a weight above 0"),
        (["lr_schedule.min_lr=1"], "above optimizer.learning_rate"),
        (["lr_schedule.warmup_steps=5", "lr_schedule.decay_steps=5"], "must be above lr_schedule.warmup_steps 5"),
        (["optimizer.betas=[0.9, 1.0]"], "not in [0, 1)"),
        (["training.micro_batch_size=0"], "greater than or equal to 1"),
        (['training.micro_batch_size="2"'], "valid integer"),
        (["model.n_layer=null"], "valid integer"),
    ],
)
def test_each_rule_names_the_wrong_value_and_what_is_valid(assignments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_config(with_keys(*assignments))
    assert message in str(error.value)


@pytest.mark.parametrize("key", OWNED_BY_MEGAGPT)
def test_every_deepspeed_key_that_megagpt_sets_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_config(with_keys(f"deepspeed.{key}=1"))
    assert f"deepspeed.{key}: megagpt sets this key itself; {OWNED_BY_MEGAGPT[key]}" in str(error.value)


def test_a_switch_for_deepspeeds_overlap_is_refused_because_megagpt_schedules_the_reduction() -> None:
    with pytest.raises(ConfigError) as error:
        build_config(with_keys("deepspeed.zero_optimization.overlap_comm=true"))
    assert str(error.value) == (
        "config: deepspeed.zero_optimization.overlap_comm: megagpt sets this key itself; "
        "remove it: megagpt schedules the gradient reduction itself"
    )


def test_other_deepspeed_keys_are_accepted() -> None:
    assert build_config(with_keys("deepspeed.zero_optimization.reduce_bucket_size=7")).deepspeed


def test_overrides_can_set_any_key(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(SMALL))
    config = load_config(path, ["parallel.tensor=4", "optimizer.learning_rate=3e-4", "data.tokenizer=data/gpt2"])
    assert (config.parallel.tensor, config.optimizer.learning_rate, config.data.tokenizer) == (4, 3e-4, "data/gpt2")
    with pytest.raises(ConfigError, match=r"expected key.path=value"):
        load_config(path, ["parallel.tensor"])
    with pytest.raises(ConfigError, match="n_layer is a value"):
        load_config(path, ["model.n_layer.x=1"])


def test_a_key_given_twice_and_broken_json_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="uplicate key"):
        load_config(write(tmp_path, '{"model": {}, "model": {}}'))
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_config(write(tmp_path, "{"))
    with pytest.raises(ConfigError, match="expected one JSON object"):
        load_config(write(tmp_path, "[]"))


def test_printed_configs_read_back_equal_and_different_configs_have_different_hashes() -> None:
    config = build_config(SMALL)
    again = build_config(json.loads(to_json(config)))
    assert again == config and config_hash(again) == config_hash(config)
    assert config_hash(build_config(with_keys("training.seed=2"))) != config_hash(config)


def test_a_flat_file_is_read_unchanged() -> None:
    config = load_config(FLAT)
    model = config.model
    assert (model.n_embd, model.n_layer, model.n_head, model.activation) == (768, 12, 12, "gelu")
    assert (model.embd_pdrop, model.attn_pdrop, model.resid_pdrop) == (0.1, 0.1, 0.1)
    assert (config.optimizer.type, config.optimizer.learning_rate) == ("adam", 6.25e-5)
    assert (config.lr_schedule.type, config.lr_schedule.decay_steps) == ("linear", 5000)
    assert (config.training.epochs, config.training.micro_batch_size, config.evaluation.micro_batch_size) == (1, 4, None)
    assert config.data.train is None
    assert all(key in FLAT.read_text() for key in FLAT_KEYS)


def test_a_misspelt_flat_key_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_epoch: no such key; did you mean max_epochs"):
        load_config(write(tmp_path, '{"n_embd": 8, "max_epoch": 1}'))


def test_one_mistake_gives_one_message() -> None:
    """Tensor size 3 does not divide the heads; the rule about context ranks must not repeat that."""
    with pytest.raises(ConfigError) as error:
        build_config(with_keys("parallel.tensor=3", "model.ffn_hidden=96", "model.vocab_multiple=96"))
    assert str(error.value) == (
        "config: parallel.tensor: 3 does not divide model.n_head 4; valid tensor sizes: 1, 2, 4; nearest model.n_head: 3"
    )


def test_too_many_stages_are_reported_beside_a_wrong_number_of_virtual_stages() -> None:
    with pytest.raises(ConfigError) as error:
        build_config(with_keys("parallel.pipeline=5", "parallel.virtual_stages=2"))
    assert "2 problems" in str(error.value)
    assert "parallel.virtual_stages: 2 with parallel.schedule 1f1b; expected 1" in str(error.value)
    assert "5 stages for model.n_layer 4" in str(error.value)


def test_the_data_parallel_size_is_the_world_divided_by_tensor_pipeline_and_context() -> None:
    assert data_parallel_size(build_config(with_keys()), 8) == 8
    assert data_parallel_size(build_config(with_keys("parallel.tensor=2", "parallel.context=2")), 8) == 2
    assert data_parallel_size(build_config(with_keys("parallel.pipeline=2", "parallel.context=4")), 8) == 1


def test_world_sizes_that_fit_are_named() -> None:
    config = build_config(with_keys("parallel.tensor=2", "parallel.pipeline=2"))
    assert data_parallel_size(config, 8) == 2
    for world_size in (0, 2, 6, 12):
        with pytest.raises(ConfigError, match=f"a world of {world_size} ranks .* world sizes that fit: 4, 8, 16, 32"):
            data_parallel_size(config, world_size)


def test_every_key_has_a_help_text() -> None:
    def walk(section: type[BaseModel]) -> None:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation)

    walk(Config)


def test_every_key_is_read_by_the_code() -> None:
    package = Path(__file__).parents[2] / "megagpt"
    sources = [path.read_text() for path in package.rglob("*.py") if path.name not in ("schema.py", "flat.py")]
    for section in Config.model_fields.values():
        if isinstance(section.annotation, type) and issubclass(section.annotation, BaseModel):
            for key in section.annotation.model_fields:
                assert any(f".{key}" in text or f'"{key}"' in text for text in sources), key


def test_more_heads_than_the_width_is_one_problem_with_rotary_embeddings() -> None:
    model = {"n_layer": 1, "n_embd": 32, "n_head": 33, "n_positions": 8, "position_embedding": "rotary"}
    training = {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1}
    with pytest.raises(ConfigError, match=r"^config: model.n_head: 33 heads do not divide model.n_embd 32"):
        build_config({"model": model, "training": training})
