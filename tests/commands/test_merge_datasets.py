"""tools/merge_datasets.py writes the bytes of one preprocessing run; a run that fails says why and writes nothing."""

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
    """Preprocess texts and return the prefix of the pair."""
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--input", str(source), "--tokenizer", "byte", "--append-eod", "--workers", "1"]
    assert preprocess_data.main([*arguments, "--output-prefix", str(folder / name)]) == 0
    return folder / f"{name}_text_document"


def write_pair(prefix: str, dtype: type = np.uint16) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        writer.add_document([1, 2, 3])


def bytes_of(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("bounds", [[0, 40], [0, 20, 40], [0, 1, 3, 5, 39, 40]])
def test_pairs_of_parts_of_a_text_merge_into_the_bytes_of_one_run(
    bounds: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(merge, "BLOCK_BYTES", 100)
    one_run = preprocess(tmp_path, "all", TEXTS)
    for start, end in pairwise(bounds):
        preprocess(tmp_path, f"part_{start:02}", TEXTS[start:end])
    capsys.readouterr()
    output = tmp_path / "new" / "out"
    assert merge_datasets.main(["--input", str(tmp_path / "part_*.idx"), "--output-prefix", str(output)]) == 0
    assert bytes_of(output) == bytes_of(one_run)
    corpus = IndexedCorpus(one_run)
    pairs = f"{len(bounds) - 1} pair{'s' if len(bounds) > 2 else ''}"
    assert f"out: {len(corpus.sizes)} documents, {corpus.n_tokens} tokens from {pairs} in" in capsys.readouterr().out


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_merge_changes_no_files(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(LogLines):
        done = 0

        def update(self, n_bytes: int) -> None:
            self.done += n_bytes
            if self.done > 500:
                raise KeyboardInterrupt

    monkeypatch.setattr(merge, "BLOCK_BYTES", 100)
    monkeypatch.setattr(merge_datasets, "progress", Interrupted)
    parts = [str(preprocess(tmp_path, name, TEXTS)) for name in ("a", "b")]
    output = tmp_path / "out" / "o"
    if overwrite:
        write_pair(str(output))
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
        (["--input", "small", "half"], "half.bin: missing, although the other file of the pair exists"),
        (["--input", "small", "gone*.idx"], "--input gone*.idx: no pair of .bin and .idx files there"),
        (["--input", "small", "other", "--output-prefix", "other"], "--output-prefix other: is one of the inputs, other"),
        (["--input", "small", "--output-prefix", "other"], "other.bin: already exists; choose another --output-prefix"),
        (["--input", "small", "--output-prefix", "torn.bin/out"], "torn.bin/out.bin: cannot be written"),
    ],
)
def test_pairs_that_cannot_be_merged_are_reported_in_one_line_and_no_file_changes(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for prefix in ("small", "other", "torn", "half"):
        write_pair(prefix)
    write_pair("large", np.int32)
    Path("torn.bin").write_bytes(b"\1\0\2\0")
    Path("half.bin").unlink()
    before = {path: path.read_bytes() for path in Path().glob("*")}
    output = [] if "--output-prefix" in arguments else ["--output-prefix", "out"]
    assert merge_datasets.main([*arguments, *output]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().glob("*")} == before
