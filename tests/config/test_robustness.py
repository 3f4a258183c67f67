"""Configs that are damaged, hostile or only unusual end with one sentence, at once, and never with another exception."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import Config, build_config, load_config
from megagpt.config.rules import divisors
from megagpt.errors import ConfigError

SMALL: dict[str, Any] = {
    "model": {"n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 16, "vocab_size": 61},
    "training": {"steps": 3, "micro_batch_size": 1, "global_batch_size": 8},
    "data": {"train": "corpus"},
}


def written(folder: Path, text: str, name: str = "run.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def base(folder: Path) -> Path:
    import json

    return written(folder, json.dumps(SMALL), "base.json")


def error_of(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


@pytest.mark.parametrize("text", ['{"\\ud800": 1}', '{"model": "\\udfff"}', '{"data": {"train": "a\\ud800"}}'])
def test_half_of_a_surrogate_pair_is_refused(text: str, tmp_path: Path) -> None:
    assert "half of a surrogate pair" in error_of(written(tmp_path, text))


@pytest.mark.parametrize("depth", [30, 500, 100_000])
def test_deep_nesting_is_refused(depth: int, tmp_path: Path) -> None:
    assert "nested" in error_of(written(tmp_path, '{"deepspeed": {"a": ' + "[" * depth + "]" * depth + "}}"))


@pytest.mark.parametrize(
    "override", ["model.n_layer=" + "[" * 3000, ".".join(["a"] * 3000) + "=1", "model.n_layer=" + "[" * 40 + "]" * 40]
)
def test_deep_nesting_on_the_command_line_is_refused(override: str, tmp_path: Path) -> None:
    message = error_of(base(tmp_path), override)
    assert len(message) < 1000


def test_a_path_with_a_nul_character_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in error_of("a\0b") or "no such config" in error_of("a\0b")
    for key in ("checkpoint.dir", "logging.metrics_file", "checkpoint.resume", "data.train"):
        assert f"{key}:" in error_of(base(tmp_path), f'{key}="a\\u0000b"')


@pytest.mark.parametrize("key", ["checkpoint.dir", "checkpoint.resume", "logging.metrics_file", "data.tokenizer", "data.train"])
def test_an_empty_path_is_refused(key: str, tmp_path: Path) -> None:
    assert f"{key}:" in error_of(base(tmp_path), f"{key}=")


def test_a_pipe_as_config_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    assert "not a regular file" in error_of(tmp_path / "pipe.json")
    assert "not a regular file" in error_of("/dev/zero")


def test_a_folder_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    assert "Is a directory" in error_of(tmp_path)
    (tmp_path / "huge.json").write_text(" " * (2**20 + 1))
    assert "expected at most 1048576" in error_of(tmp_path / "huge.json")


def test_ten_thousand_unknown_keys_are_reported_shortened(tmp_path: Path) -> None:
    keys = ", ".join(f'"key{number}": 1' for number in range(10_000))
    message = error_of(written(tmp_path, "{" + keys + "}"))
    assert "10002 problems" in message and "more" in message and len(message) < 20_000


@pytest.mark.parametrize(
    "override",
    [
        "model.n_layer=1000000000",
        "model.n_embd=1000000007",
        "model.n_embd=" + "9" * 30,
        "model.vocab_size=1000000000000",
        "model.vocab_multiple=1000000000",
        "training.global_batch_size=1073741825",
        "training.steps=" + "9" * 30,
        "evaluation.samples=" + "9" * 30,
        "parallel.timeout_seconds=1e300",
        "resilience.spike_window=" + "9" * 30,
        'data.split="1,nan,1"',
        'data.split="inf,1,1"',
        'data.split="1e308,1e308,1e308"',
        "zero.stage=true",
        "training.steps=true",
        "training.steps=1.5",
        "logging.wandb.project=a/b:c",
    ],
)
def test_values_beyond_reason_name_their_key(override: str, tmp_path: Path) -> None:
    key = override.partition("=")[0]
    assert key in error_of(base(tmp_path), override)


def test_an_unknown_key_for_deepspeed_names_the_nearest(tmp_path: Path) -> None:
    message = error_of(base(tmp_path), "deepspeed.zero_optimisation={}")
    assert "deepspeed.zero_optimisation: DeepSpeed has no such key; the nearest is zero_optimization" in message


def test_all_divisors_of_large_numbers_are_found_at_once() -> None:
    assert divisors(1) == [1]
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert divisors(2**30) == [2**power for power in range(31)]
    assert divisors(1_073_741_789) == [1, 1_073_741_789]  # a prime


@pytest.mark.parametrize(
    ("text", "value"), [("1e6", 10**6), ("10M", 10**7), ("2.5k", 2500), ("300B", 3 * 10**11), ("1T", 10**12), ("3000.0", 3000)]
)
def test_whole_numbers_can_be_written_with_exponents_and_suffixes(text: str, value: int, tmp_path: Path) -> None:
    config = load_config(base(tmp_path), ["training.steps=null", f"training.tokens={text}"])
    assert config.training.tokens == value and isinstance(config.training.tokens, int)


def test_a_suffix_stays_text_where_text_is_expected(tmp_path: Path) -> None:
    assert load_config(base(tmp_path), ["checkpoint.dir=10M"]).checkpoint.dir == "10M"


def test_a_tuple_that_is_no_list_shows_how_to_write_it(tmp_path: Path) -> None:
    assert "write it as [0.9, 0.95]" in error_of(base(tmp_path), "optimizer.betas=0.9,0.99")


def test_a_tilde_is_the_home_directory_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(
        base(tmp_path), ["checkpoint.dir=~/runs", "logging.metrics_file=~/m.jsonl", 'data.train={"~/a": 1.0, "b": 2.0}']
    )
    assert config.checkpoint.dir == str(tmp_path / "runs")
    assert config.logging.metrics_file == str(tmp_path / "m.jsonl")
    assert config.data.train == {str(tmp_path / "a"): 1.0, "b": 2.0}


def test_an_environment_variable_in_a_path_is_its_value_if_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NO_SUCH_NAME", raising=False)
    config = load_config(
        base(tmp_path), ["checkpoint.dir=$SCRATCH/a", "data.train=${SCRATCH}/b", "logging.metrics_file=$NO_SUCH_NAME"]
    )
    assert (config.checkpoint.dir, config.data.train) == ("/scratch/a", "/scratch/b")
    assert config.logging.metrics_file == "$NO_SUCH_NAME"


def test_json_errors_name_the_line_and_nothing_of_the_library(tmp_path: Path) -> None:
    message = error_of(written(tmp_path, '{"model": {},\n "training" {}}'))
    assert "line 2" in message and "<string>" not in message


def test_a_shipped_config_is_found_by_its_name() -> None:
    assert load_config("125M").model.n_layer == load_config("configs/125M.json").model.n_layer
    assert "nearest: 125M" in error_of("126M")


def test_a_config_extends_another_section_by_section(tmp_path: Path) -> None:
    base(tmp_path)
    child = written(
        tmp_path, '{"extends": "base.json", "training": {"steps": 7}, "data": {"train": {"a": 1, "b": 2}}}', "child.json"
    )
    grandchild = written(tmp_path, '{"extends": "child.json", "data": {"train": {"c": 1}}}')
    config: Config = load_config(child)
    assert (config.training.steps, config.training.global_batch_size, config.model.n_layer) == (7, 8, 4)
    assert load_config(grandchild).data.train == {"c": 1.0}  # a value, not a section: replaced
    assert load_config(written(tmp_path, '{"extends": "125M", "training": {"steps": 1, "tokens": null}}')).model.n_embd == 768


def test_extends_that_leads_back_or_nowhere_is_refused(tmp_path: Path) -> None:
    written(tmp_path, '{"extends": "b.json"}', "a.json")
    written(tmp_path, '{"extends": "a.json"}', "b.json")
    assert "leads back" in error_of(tmp_path / "a.json")
    assert "nothere" in error_of(written(tmp_path, '{"extends": "nothere.json"}'))
    assert "extends: 3" in error_of(written(tmp_path, '{"extends": 3}'))


def test_the_classifier_dropout_of_a_flat_file_is_read(tmp_path: Path) -> None:
    config = load_config("tests/fixtures/flat_gpt.json", ["model.vocab_size=100"])
    assert config.model.clf_pdrop == pytest.approx(0.1)
    with pytest.raises(ConfigError, match=r"model.clf_pdrop: 1.5"):
        build_config({**SMALL, "model": {**SMALL["model"], "clf_pdrop": 1.5}})


def test_no_test_here_left_a_thread_behind() -> None:
    assert threading.active_count() < 10
