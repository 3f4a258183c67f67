"""Merging by the command: the bytes of one preprocessing run; a run that fails says why and leaves nothing."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megagpt.commands import merge_datasets, preprocess_data
from megagpt.commands.progress import LogLines
from megagpt.data.indexed import IndexedCorpus, IndexedWriter
from megagpt.data.offline import merge

TEXTS = ["" if n % 7 == 3 else f"Grüße {n}, 世界! " * (n % 5 + 1) for n in range(40)]


def preprocess(folder: Path, name: str, texts: list[str]) -> Path:
    """The pair's prefix."""
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--input", str(source), "--tokenizer", "byte", "--append-eod", "--workers", "1"]
    assert preprocess_data.main([*arguments, "--output-prefix", str(folder / name)]) == 0
    return folder / f"{name}_text_document"


def write(prefix: str, dtype: type = np.uint16) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        writer.add_document([1, 2, 3])


def pair(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("cuts", [[0, 40], [0, 20, 40], [0, 1, 3, 5, 39, 40]])
def test_the_parts_of_a_text_merge_into_the_bytes_of_one_run(
    cuts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(merge, "BLOCK_BYTES", 100)
    whole = preprocess(tmp_path, "whole", TEXTS)
    for start, end in pairwise(cuts):
        preprocess(tmp_path, f"part_{start:02}", TEXTS[start:end])
    capsys.readouterr()
    output = tmp_path / "new" / "out"
    assert merge_datasets.main(["--input", str(tmp_path / "part_*.idx"), "--output-prefix", str(output)]) == 0
    assert pair(output) == pair(whole)
    corpus = IndexedCorpus(whole)
    parts = f"{len(cuts) - 1} pair{'s' if len(cuts) > 2 else ''}"
    assert f"out: {len(corpus.sizes)} documents, {corpus.n_tokens} tokens from {parts} in" in capsys.readouterr().out


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_merge_leaves_nothing_but_what_was_there(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Interrupted(LogLines):
        def update(self, n_bytes: int) -> None:
            super().update(n_bytes)
            if self._done > 500:
                raise KeyboardInterrupt

    monkeypatch.setattr(merge, "BLOCK_BYTES", 100)
    monkeypatch.setattr(merge_datasets, "progress", Interrupted)
    parts = [str(preprocess(tmp_path, name, TEXTS)) for name in ("a", "b")]
    output = tmp_path / "out" / "o"
    if overwrite:
        write(str(output))
    before = {path.name: path.read_bytes() for path in output.parent.glob("*")}
    arguments = ["--input", *parts, "--output-prefix", str(output), *["--overwrite"] * overwrite]
    assert merge_datasets.main(arguments) == 130
    assert {path.name: path.read_bytes() for path in output.parent.glob("*")} == before
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "small", "large"], "large: its tokens are int32, but those of small are uint16"),
        (["--input", "small", "smal"], "smal: no such corpus: smal.bin and smal.idx are missing; nearest prefix there: small"),
        (["--input", "small", "torn"], "torn.bin: 4 bytes, shorter than the 6 that torn.idx describes"),
        (["--input", "small", "half"], "half.bin: missing, although its partner exists"),
        (["--input", "small", "gone*.idx"], "--input gone*.idx: no pair of .bin and .idx there"),
        (["--input", "small", "other", "--output-prefix", "other"], "--output-prefix other: is one of the inputs, other"),
        (["--input", "small", "--output-prefix", "other"], "other.bin: exists already; choose another --output-prefix"),
        (["--input", "small", "--output-prefix", "torn.bin/out"], "torn.bin/out.bin: cannot be written"),
    ],
)
def test_what_cannot_be_merged_ends_in_one_line_and_changes_nothing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for prefix in ("small", "other", "torn", "half"):
        write(prefix)
    write("large", np.int32)
    Path("torn.bin").write_bytes(b"\1\0\2\0")
    Path("half.bin").unlink()
    before = {path: path.read_bytes() for path in Path().glob("*")}
    output = [] if "--output-prefix" in arguments else ["--output-prefix", "out"]
    assert merge_datasets.main([*arguments, *output]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().glob("*")} == before
