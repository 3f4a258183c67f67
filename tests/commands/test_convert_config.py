"""The convert_config command: arguments of Megatron-LM and keys of GPT-NeoX become a config; nothing is dropped silently."""

import json
from pathlib import Path
from typing import Any

import pytest

from megagpt.commands.convert_config import main, read_foreign
from megagpt.config import build_config
from megagpt.config.foreign import convert, from_keys
from megagpt.config.foreign_arguments import from_arguments
from megagpt.config.foreign_tables import CHOICES, DEFAULTS, FLAGS, SAME_VALUE, WITHOUT_EFFECT
from megagpt.config.load import _annotation
from megagpt.planner.parameters import parameter_count

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "migrating" / "megatron.sh"
PYTHIA = """{
  "pipe-parallel-size": 1, "model-parallel-size": 1, "num-layers": 24, "hidden-size": 2048, "num-attention-heads": 16,
  "seq-length": 2048, "max-position-embeddings": 2048, "pos-emb": "rotary", "rotary-pct": 0.25, "no-weight-tying": true,
  "gpt-j-residual": true, "norm": "layernorm", "init_method": "small_init", "output_layer_init_method": "wang_init",
  # a comment
  "optimizer": {"type": "Adam", "params": {"lr": 0.0002, "betas": [0.9, 0.95], "eps": 1.0e-8}}, "min_lr": 0.00002,
  "zero_optimization": {"stage": 1, "cpu_offload": false}, "train_micro_batch_size_per_gpu": 16, "train_batch_size": 1024,
  "split": "969,30,1", "gradient_clipping": 1.0, "weight-decay": 0.01, "fp16": {"enabled": true, "initial_scale_power": 12},
  "train-iters": 143000, "lr-decay-iters": 143000, "lr-decay-style": "cosine", "warmup": 0.01, "checkpoint-factor": 1000,
  "eval-interval": 40000, "eval-iters": 10, "data-path": "data/pile", "make_vocab_size_divisible_by": 256, "vocab_size": 50304,
  "sparsity_config": {"block": 16}
}
"""


def sections_of(text: str) -> dict[str, Any]:
    return convert(from_arguments(text)).tree


def test_a_script_of_megatron_becomes_a_config_that_runs(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main([str(EXAMPLE), "--output", str(tmp_path / "new" / "8B.json")]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        "note: moe_grouped_gemm True: has no counterpart",
        "note: not needed: group_query_attention, max_position_embeddings, tokenizer_type",
    ]
    config = build_config(json.loads((tmp_path / "new" / "8B.json").read_text()))
    assert parameter_count(config) == 8_030_261_248  # LLaMA 3.1 8B
    assert (config.parallel.tensor, config.parallel.pipeline, config.zero.stage) == (4, 2, 1)
    assert (config.training.steps, config.evaluation.samples) == (100_000, 5120)
    assert config.optimizer.betas == (0.9, 0.95) and config.model.resid_pdrop == 0


def test_a_config_of_gpt_neox_becomes_a_config_that_runs(tmp_path: Path) -> None:
    (tmp_path / "1.4B.yml").write_text(PYTHIA)
    result = read_foreign(tmp_path / "1.4B.yml")
    assert result.missing == ["sparsity_config {'block': 16}: has no counterpart"]
    config = build_config(result.tree)
    assert parameter_count(config) == 1_414_647_808  # Pythia 1.4B
    assert (config.model.parallel_branches, config.model.init_scheme) == ("two_norms", "small_wang")
    assert config.deepspeed == {"fp16": {"initial_scale_power": 12}}
    assert config.lr_schedule.warmup_steps == 1430 and config.training.precision == "fp16"


@pytest.mark.parametrize("name, key", [*SAME_VALUE.items(), *((name, key) for name, (key, _) in FLAGS.items())])
def test_every_name_leads_to_a_key_of_the_config(name: str, key: str) -> None:
    assert _annotation(key.split(".")) is not None


def test_every_choice_is_a_value_of_its_key() -> None:
    base = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 8}
    training = {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1}
    for key, value in [(key, value) for key, values in CHOICES.values() for value in values.values()] + list(FLAGS.values()):
        section, leaf = key.rsplit(".", 1)
        if value is None or section == "model.rotary" or key == "parallel.sequence_parallel":
            continue
        tree: dict[str, Any] = {"model": dict(base), "training": dict(training)}
        tree.setdefault(section, {})[leaf] = value
        build_config(tree)


def test_no_name_is_in_two_tables() -> None:
    tables = (SAME_VALUE.keys(), CHOICES.keys(), FLAGS.keys() - {"fp16", "bf16"}, WITHOUT_EFFECT)
    assert sum(map(len, tables)) == len(set().union(*tables))


def test_defaults_of_the_other_program_are_written() -> None:
    assert sections_of("--num-layers 2")["model"]["resid_pdrop"] == 0.1
    assert sections_of("--num-layers 2 --hidden-dropout 0")["model"]["resid_pdrop"] == 0
    assert sections_of("--num-layers 2")["optimizer"] == {"betas": [0.9, 0.999], "weight_decay": 0.01}
    assert sections_of("--num-layers 2 --adam-beta2 0.95")["optimizer"]["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    "arguments, section, expected",
    [
        ("--data-path 0.7 data/a 0.3 data/b", "data", {"paths": {"data/a": 0.7, "data/b": 0.3}}),
        ("--data-path data/a", "data", {"paths": "data/a"}),
        ("--vocab-file x/vocab.json --merge-file x/merges.txt", "data", {"tokenizer": "x"}),
        ("--rampup-batch-size 16 8 6000", "training", {"batch_ramp": {"start": 16, "increment": 8, "samples": 6000}}),
        ("--train-samples 1000 --seq-length 8", "training", {"tokens": 8000}),
        ("--fp16 --initial-loss-scale 65536", "deepspeed", {"fp16": {"initial_scale_power": 16}}),
        ("--exit-duration-in-mins 90", "training", {"max_hours": 1.5}),
        ("--zero-stage=1 --use-distributed-optimizer", "zero", {"stage": 1}),
        ("--start-weight-decay 0.01 --end-weight-decay 0.1 --weight-decay-incr-style cosine", "optimizer", {
            "weight_decay": 0.01, "final_weight_decay": 0.1, "weight_decay_schedule": "cosine", "betas": [0.9, 0.999],
        }),
        ("--num-layers 12 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3", "parallel", {
            "pipeline": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b",
        }),
    ],
)  # fmt: skip
def test_arguments_that_go_together(arguments: str, section: str, expected: dict[str, Any]) -> None:
    assert sections_of(arguments)[section] == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--position-embedding-type mrope", "position_embedding_type mrope: model.position_embedding has learned_absolute"),
        ("--optimizer lion", "optimizer lion: has no counterpart"),
        ("--init-method xavier_normal", "model.init_scheme has other pairs"),
        ("--load other --save runs/x", "load other: checkpoints of other programs cannot be loaded"),
        ("--num-experts 8", "num_experts 8: has no counterpart"),
        ("--bf16 --fp16", "training.precision bf16: contradicts fp16, which is used"),
        ("--fp16 2", "fp16 2: is a switch without a value"),
        ("--lr 1e-3 --lr 2e-3", "lr 0.001: is given again; 0.002 is used"),
        ("--lr-warmup-fraction x --train-iters 10", "lr_warmup_fraction x: expected a number"),
        ("--lr-warmup-fraction 0.1", "lr_warmup_fraction 0.1: needs train_iters"),
        ("--lr-warmup-iters $((10 * 5))", "lr_warmup_iters: is computed by the shell"),
        ("--save `date`", "save: is computed by the shell"),
        ("--rampup-batch-size 16 8", "rampup_batch_size [16, 8]: expected three integers"),
        ("--data-path 0.3 a 0.7", "data_path [0.3, 'a', 0.7]: expected paths, or pairs of a weight and a path"),
        ("--train-samples 10 --train-iters 5", "train_samples 10: contradicts train_iters"),
        ("--train-samples 10", "train_samples 10: needs seq_length"),
        ("--eval-iters 10", "eval_iters 10: needs global_batch_size"),
        ("--window-size (a,b)", "window_size"),
        ("--exit-duration-in-mins soon", "exit_duration_in_mins soon: expected a number"),
        ("--merge-file m.txt", "merge_file m.txt: needs vocab_file"),
        ("--num-layers-per-virtual-pipeline-stage x", "expected a number"),
        ("--lr-wsd-decay-iters 10", "lr_wsd_decay_iters 10: has no effect"),
    ],
)
def test_what_has_no_counterpart_is_named(arguments: str, message: str) -> None:
    (missing,) = convert(from_arguments(f"--num-layers 2 {arguments}")).missing
    assert message in missing


def test_keys_of_sections_without_a_counterpart_are_named() -> None:
    tree = {
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "amsgrad": True}},
        "zero_optimization": {"stage": 1, "sub_group_size": 7},
        "fp16": {"enabled": True, "auto_cast": True},
        "train_data_paths": ["a", "b"],
        "train_data_weights": [1.0],
    }
    assert convert(from_keys(tree)).missing == [
        "optimizer.params.amsgrad True: has no counterpart",
        "zero_optimization.sub_group_size 7: has no counterpart",
        "fp16.auto_cast True: has no counterpart",
        "train_data_paths ['a', 'b']: expected as many weights as paths, found [1.0]",
    ]


def test_the_end_of_an_array_of_bash_ends_an_argument() -> None:
    """Megatron-LM's own scripts have arrays whose last word may be a switch; comments are no values either."""
    text = """
        MODEL_ARGS=(
            --hidden-size 64   # width
            --untie-embeddings-and-output-weights
        )
        TRAINING_ARGS=( --lr 1e-3 --bf16 )
        DATA_ARGS=( --split 949,50,1 )
        torchrun pretrain_gpt.py ${MODEL_ARGS[@]} --save $RUN_DIR "$@"
    """
    assert from_arguments(text) == {
        "hidden_size": 64,
        "untie_embeddings_and_output_weights": True,
        "lr": 1e-3,
        "bf16": True,
        "split": "949,50,1",
        "save": "$RUN_DIR",
    }


def test_a_switch_that_is_off_is_not_reported() -> None:
    result = convert({"num_layers": 2, "moe": False, "sequence_parallel": False})
    assert result.missing == [] and "parallel" not in result.tree


def test_every_default_is_a_key() -> None:
    assert all(_annotation(key.split(".")) is not None for keys in DEFAULTS.values() for key in keys)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.sh", "echo hello", "no argument such as --num-layers"),
        ("a.sh", "--x 'open", "cannot be read"),
        ("a.yml", "[1, 2]", "expected keys and values, found list"),
        ("a.yml", "a: [", "not valid YAML"),
    ],
)
def test_files_without_arguments_are_errors_of_one_line(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / name).write_text(content)
    assert main([str(tmp_path / name)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err
    assert str(tmp_path / name) in printed.err


def test_an_existing_output_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "out.json").write_text("mine")
    assert main([str(EXAMPLE), "--output", str(tmp_path / "out.json")]) == 2
    assert "exists already" in capsys.readouterr().err and (tmp_path / "out.json").read_text() == "mine"
    assert main([str(tmp_path / "gone.sh")]) == 2 and "cannot be read" in capsys.readouterr().err
    assert main([str(EXAMPLE)]) == 0 and json.loads(capsys.readouterr().out)["parallel"]["tensor"] == 4


def rows_of_the_page() -> dict[str, str]:
    """Return the rows of the tables in docs/migrating.md: foreign name -> second cell."""
    lines = (ROOT / "docs" / "migrating.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {name.strip("` "): row[1] for row in cells for name in row[0].split(",")}


def test_the_page_has_every_name_with_its_key() -> None:
    rows = rows_of_the_page()
    for name, key in SAME_VALUE.items():
        assert f"`{key}`" in rows[name], name
    for name, (key, _) in {**CHOICES, **FLAGS}.items():
        assert f"`{key}`" in rows[name], name
