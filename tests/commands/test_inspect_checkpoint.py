"""The inspect_checkpoint command: norms equal those of tensors joined by hand; each problem is one line, exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.pool import Pool
from support.runs import Tree
from support.saved import flip_bit, rewrite_file, rewrite_manifest, save_small

from megagpt.commands.inspect_checkpoint import main
from megagpt.distributed.phase import host_name

ADAM = ["master", "exp_avg", "exp_avg_sq"]
TOKEN = "embedding.token.weight"


@pytest.fixture(scope="module")
def run(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint folder, with one checkpoint of four ranks."""
    folder = tmp_path_factory.mktemp("inspected")
    save_small(ranks, folder)
    return folder / "checkpoints"


@pytest.fixture
def checkpoint(run: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to alter."""
    return Path(shutil.copytree(run / "step_00000002", tmp_path / "step_00000002"))


def full_tensors(folder: Path, shapes: dict[str, list[int]]) -> dict[tuple[str, str], torch.Tensor]:
    """Return (state, parameter name) -> full tensor, joined by the keys in the files."""
    tensors: dict[tuple[str, str], torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        for key, values in load_file(path).items():
            state, _, name_and_offset = key.partition("/")
            name, _, offset = name_and_offset.partition("@")
            slices = tuple(slice(int(a), int(a) + n) for a, n in zip(offset.split(","), values.shape, strict=True))
            tensors.setdefault((state, name), torch.full(shapes[name], float("nan")))[slices] = values
    return tensors


def as_json(folder: Path, capsys: pytest.CaptureFixture, *arguments: str) -> Tree:
    assert main([str(folder), "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def errors(arguments: list[str], capsys: pytest.CaptureFixture) -> list[str]:
    """Run a command that must fail; return the lines that it prints."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err.splitlines()


def test_norms_are_those_of_the_full_weights(run: Path, capsys: pytest.CaptureFixture) -> None:
    tensors = as_json(run, capsys)["tensors"]
    full = full_tensors(run / "step_00000002", {tensor["name"]: tensor["shape"] for tensor in tensors})
    assert [tensor["name"] for tensor in tensors] == sorted({name for _, name in full}) and len(tensors) == 4 * 12 + 4
    for tensor in tensors:
        values = full["master", tensor["name"]]
        assert values.isfinite().all()
        assert tensor["norm"] == pytest.approx(torch.linalg.vector_norm(values.double()).item(), rel=1e-12)
        assert tensor["kinds"] == ADAM and tensor["non_finite"] == {}


def test_tensors_of_the_test_checkpoint_are_split_into_several_boxes(run: Path) -> None:
    """Otherwise the tests of this file would show little."""
    manifest = json.loads((run / "step_00000002" / "manifest.json").read_text())
    assert max(len(record["boxes"]) for record in manifest["tensors"].values()) >= 4
    assert {number for record in manifest["tensors"].values() for number, *_ in record["boxes"]} == {0, 1, 2, 3}


def test_json_output_has_all_facts(run: Path, capsys: pytest.CaptureFixture) -> None:
    report = as_json(run / "step_00000002", capsys)
    h, layers, files = 32, 4, list(run.rglob("*.safetensors"))
    del report["tensors"]
    assert report == {
        "folder": str(run / "step_00000002"),
        "step": 2,
        "samples": 16,
        "optimizer": "adamw",
        "optimizer_step": 2,
        "layout": {"tensor": 2, "pipeline": 1, "context": 1, "zero_stage": 1},
        "precision": "fp32",
        "files": 4,
        "bytes": sum(path.stat().st_size for path in files),
        "tokenizer": None,
        "nodes": [host_name()],
        "checksums": True,
        "parameters": (61 + 16) * h + layers * (12 * h * h + 13 * h) + 2 * h,
    }


def test_text_output_lists_the_contents(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = sum(path.stat().st_size for path in run.rglob("*.safetensors"))
    assert lines[:11] == [
        str(run / "step_00000002"),
        "  step         2",
        "  samples      16",
        "  optimizer    adamw, 2 updates",
        "  saved under  tensor 2, pipeline 1, context 1, ZeRO stage 1, precision fp32",
        f"  files        4, {size:,} bytes",
        "  tokenizer    none in the checkpoint",
        f"  written by   {host_name()}",
        "  checked      size and SHA-256 of every file, boxes of every tensor",
        "  parameters   53,344 in 52 tensors",
        "",
    ]
    tables = {line.split()[0]: line for line in lines[11:]}
    norm = {tensor["name"]: tensor["norm"] for tensor in as_json(run, capsys)["tensors"]}[TOKEN]
    assert tables["name"].split() == ["name", "shape", "norm", "saved", "not", "finite"]
    assert tables[TOKEN].split(maxsplit=5) == [TOKEN, "61", "x", "32", f"{norm:.6g}", ", ".join(ADAM)]


def test_config_prints_the_saved_config(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(run), "--config"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert (config["parallel"]["tensor"], config["model"]["n_embd"], config["checkpoint"]["dir"]) == (2, 32, str(run))


def test_values_that_are_not_finite_are_counted_by_state(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    def insert(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"exp_avg/{TOKEN}@0,0"][0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
        tensors["master/embedding.position.weight@0,0"][0, 0] = float("nan")

    rewrite_file(checkpoint, 0, insert)
    assert main([str(checkpoint), "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {checkpoint}: 4 values are not finite, in embedding.position.weight, {TOKEN}\n"
    tensors = {tensor["name"]: tensor for tensor in json.loads(printed.out)["tensors"]}
    assert tensors[TOKEN]["non_finite"] == {"exp_avg": 3} and tensors[TOKEN]["norm"] > 0
    assert tensors["embedding.position.weight"]["non_finite"] == {"master": 1}
    assert tensors["embedding.position.weight"]["norm"] is None
    assert sum(bool(tensor["non_finite"]) for tensor in tensors.values()) == 2
    assert main([str(checkpoint)]) == 2
    flagged = [line for line in capsys.readouterr().out.splitlines() if "!" in line]
    assert [(line.split()[0], line.partition("! ")[2]) for line in flagged] == [
        ("embedding.position.weight", "1 of master"),
        (TOKEN, "3 of exp_avg"),
    ]
    assert " nan " in flagged[0]


def truncate(folder: Path) -> None:
    path = folder / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def in_manifest(change: Callable[[Tree], None]) -> Callable[[Path], None]:
    """Damage to the manifest that its checksum does not reveal."""
    return lambda folder: rewrite_manifest(folder, change)


def boxes(manifest: Tree, name: str = TOKEN) -> list:
    return manifest["tensors"][name]["boxes"]


def move_first_down(manifest: Tree) -> None:
    """Move a box; the sum of the sizes stays correct."""
    boxes(manifest)[0][1][0] += 1


def drop_weight(manifest: Tree) -> None:
    manifest["tensors"][TOKEN]["kinds"].remove("master")


def claim_tensor(manifest: Tree) -> None:
    """Claim a tensor of 2^31 values in the first file."""
    manifest["tensors"]["extra"] = {"shape": [2**31], "kinds": ["master"], "boxes": [[0, [0], [2**31]]]}


def exchange_files(manifest: Tree) -> None:
    boxes(manifest)[0][0], boxes(manifest)[-1][0] = boxes(manifest)[-1][0], boxes(manifest)[0][0]


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (lambda folder: flip_bit(folder / "rank_00002.safetensors"), "rank_00002.safetensors: its SHA-256 differs"),
    "truncated": (truncate, "rank_00001.safetensors: "),
    "missing": (lambda folder: (folder / "rank_00003.safetensors").unlink(), f"missing; node {host_name()} wrote it"),
    "foreign": (lambda folder: (folder / "notes.txt").touch(), "notes.txt: not a file of this checkpoint"),
    "gap": (in_manifest(lambda manifest: boxes(manifest).pop()), " of 1952 values are in no box"),
    "no box": (in_manifest(lambda manifest: boxes(manifest).clear()), f"{TOKEN}: 1952 of 1952 values are in no box"),
    "box twice": (in_manifest(lambda manifest: boxes(manifest).append(boxes(manifest)[0])), f"{TOKEN}: its boxes of size ["),
    "gap and overlap": (in_manifest(move_first_down), f"{TOKEN}: its boxes of size ["),
    "beyond the shape": (in_manifest(lambda manifest: boxes(manifest)[0][2].__setitem__(1, 33)), "is not inside its shape"),
    "empty box": (in_manifest(lambda manifest: boxes(manifest)[0][2].__setitem__(0, 0)), "is not inside its shape"),
    "no such file": (in_manifest(lambda manifest: boxes(manifest)[0].__setitem__(0, 4)), "is in file 4 of 4"),
    "no weight": (in_manifest(drop_weight), f"{TOKEN}: its weight was not saved, only exp_avg, exp_avg_sq"),
    "no state": (in_manifest(lambda manifest: manifest["state"].clear()), "state is of another version of megagpt: cons"),
    "samples": (in_manifest(lambda manifest: manifest["state"].update(consumed_samples="x")), "megagpt: consumed_samples: "),
    "updates": (in_manifest(lambda manifest: manifest["state"].update(optimizer_step=None)), "megagpt: optimizer_step: "),
    "other state": (in_manifest(lambda manifest: manifest["state"].update(experts=8)), "megagpt: experts: Extra inputs"),
    "other config": (in_manifest(lambda manifest: manifest["config"].update(experts={})), "megagpt: experts: no such key"),
    "no tensors": (in_manifest(lambda manifest: manifest["tensors"].clear()), "manifest.json: has no tensors"),
    "large tensor": (in_manifest(claim_tensor), "rank_00000.safetensors has "),
    "manifest": (lambda folder: flip_bit(folder / "manifest.json"), "manifest.json: its SHA-256 differs from the one in"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: No such file or directory"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_problem_is_reported_in_one_line(damage: str, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    apply, message = DAMAGES[damage]
    apply(checkpoint)
    [line] = errors([str(checkpoint)], capsys)
    assert line.startswith(f"error: {checkpoint}") and message in line


def test_a_file_with_other_boxes_than_in_the_manifest_is_named(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    rewrite_manifest(checkpoint, exchange_files)
    lines = errors([str(checkpoint)], capsys)
    assert lines.pop(0) == f"error: {checkpoint}: 2 problems"
    assert len(lines) == 2 and all(f"{TOKEN}@" in line and "cannot be read" in line for line in lines)


def test_a_box_with_another_size_than_in_the_manifest_is_named(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors["exp_avg/embedding.position.weight@0,0"] = tensors["exp_avg/embedding.position.weight@0,0"][:1].clone()

    rewrite_file(checkpoint, 0, shorten)
    [line] = errors([str(checkpoint)], capsys)
    assert "exp_avg/embedding.position.weight@0,0 is [1, 32] of torch.float32, the manifest has [" in line


def test_each_problem_has_its_own_line(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    rewrite_manifest(checkpoint, lambda manifest: [boxes(manifest, name).pop() for name in (TOKEN, "final_norm.weight")])
    flip_bit(checkpoint / "rank_00000.safetensors")
    truncate(checkpoint)
    (checkpoint / "rank_00003.safetensors").unlink()
    lines = errors([str(checkpoint)], capsys)
    assert lines.pop(0) == f"error: {checkpoint}: 5 problems"
    assert [line.partition(str(checkpoint))[0] for line in lines] == ["  "] * 5
    texts = ["rank_00003", "rank_00000", "rank_00001", "no box", "no box"]
    assert all(text in line for text, line in zip(texts, lines, strict=True))


def test_without_checksums_the_contents_of_files_are_not_checked(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    flip_bit(checkpoint / "rank_00000.safetensors")
    report = as_json(checkpoint, capsys, "--skip-checksums")
    assert not report["checksums"] and len(report["tensors"]) == 52
    truncate(checkpoint)
    [line] = errors([str(checkpoint), "--skip-checksums"], capsys)
    assert "rank_00001.safetensors: cannot be read" in line


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert errors([str(tmp_path)], capsys) == [
        f"error: {tmp_path}: no checkpoint here; expected a folder with manifest.json, or a folder that contains checkpoints"
    ]
    [line] = errors([str(tmp_path / "gone")], capsys)
    assert "gone: no checkpoint here" in line
    (tmp_path / "file").touch()
    [line] = errors([str(tmp_path / "file")], capsys)
    assert "file: Not a directory" in line
