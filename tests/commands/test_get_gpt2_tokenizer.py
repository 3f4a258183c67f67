"""tools/get_gpt2_tokenizer.py writes only files with the expected SHA-256, from an address or from a folder."""

import hashlib
from pathlib import Path

import pytest

from megagpt.commands import get_gpt2_tokenizer
from megagpt.commands.get_gpt2_tokenizer import FILES, TokenizerFile, downloaded, main
from megagpt.errors import DataError

CONTENTS = {"vocab.json": b'{"a": 0}', "merges.txt": b"#version: 0.2\na b\n"}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with other files in the place of GPT-2's. They are the expected files, at addresses of this folder."""
    folder = tmp_path / "source"
    folder.mkdir()
    files = []
    for file in FILES:
        content = CONTENTS[file.name]
        (folder / file.name).write_bytes(content)
        urls = ((folder / "absent").as_uri(), (folder / file.name).as_uri())
        files.append(TokenizerFile(file.name, file.openai_name, hashlib.sha256(content).hexdigest(), urls))
    monkeypatch.setattr(get_gpt2_tokenizer, "FILES", tuple(files))
    return folder


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_the_second_address_is_used_if_the_first_has_no_file(source: Path, tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path / "gpt2")]) == 0
    assert written(tmp_path / "gpt2") == CONTENTS


def test_the_files_of_a_folder_are_copied_also_under_openais_names(source: Path, tmp_path: Path) -> None:
    (source / "vocab.json").rename(source / "encoder.json")
    (source / "merges.txt").rename(source / "vocab.bpe")
    assert main(["--output", str(tmp_path / "gpt2"), "--from", str(source)]) == 0
    assert written(tmp_path / "gpt2") == CONTENTS


def test_complete_files_are_kept_and_damaged_ones_are_replaced(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gpt2"
    assert main(["--output", str(output), "--from", str(source)]) == 0
    (output / "merges.txt").write_text("damaged")
    (source / "vocab.json").unlink()  # not needed any more
    capsys.readouterr()
    assert main(["--output", str(output), "--from", str(source)]) == 0
    assert "vocab.json: complete already" in capsys.readouterr().out
    assert written(output) == CONTENTS


def test_a_file_with_another_checksum_is_refused_and_not_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "vocab.json").write_text("{}")
    for flags in ([], ["--from", str(source)]):
        assert main(["--output", str(tmp_path / "gpt2"), *flags]) == 2
        error = capsys.readouterr().err
        assert hashlib.sha256(b"{}").hexdigest() in error and error.count("\n") == 1
    assert written(tmp_path / "gpt2") == {}


def test_without_a_network_the_error_names_each_address_and_the_way_without_one(source: Path) -> None:
    (source / "vocab.json").unlink()
    with pytest.raises(DataError, match=r"vocab.json: cannot be downloaded: file:.*absent: .*; file:.*vocab.json: .*--from"):
        downloaded(get_gpt2_tokenizer.FILES[0])


def test_a_folder_without_the_files_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path / "gpt2"), "--from", str(tmp_path)]) == 2
    assert "has no vocab.json, or encoder.json as OpenAI names it" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["--output", str(tmp_path / "file" / "gpt2"), "--from", str(source)]) == 2
    assert "cannot be written" in capsys.readouterr().err
