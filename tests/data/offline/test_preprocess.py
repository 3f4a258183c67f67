"""Runs write the bytes that Megatron writes, for any number of workers; a run that was stopped and resumed too."""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megagpt.commands import preprocess_data
from megagpt.data.indexed import IndexedCorpus
from megagpt.data.offline import preprocess
from megagpt.data.offline.preprocess import Counts, PreprocessJob
from megagpt.data.offline.resume_log import ResumeLog
from megagpt.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megagpt.errors import DataError

ROOT = Path(__file__).parents[3]


class KilledTokenizer(ByteTokenizer):
    """A tokenizer that kills its process, as the kernel kills one that takes too much memory."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if any("kill" in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_batch(texts)


class WideTokenizer(ByteTokenizer):
    """A tokenizer whose vocabulary needs four bytes per token."""

    vocab_size = 70_000

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[300 * byte for byte in text.encode()] for text in texts]


class DifferentTokenizer(ByteTokenizer):
    """A tokenizer whose ids for texts of shard 1 differ from those of the fast encoder."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte ^ ("shard 1 " in text) for byte in text.encode()] for text in texts]


def shards(folder: Path, n_shards: int = 4, documents: int = 50) -> list[Path]:
    """Write files of JSON lines in which every seventh document is empty."""
    paths = []
    for shard in range(n_shards):
        path = folder / f"{shard:02}.jsonl"
        texts = ["" if n % 7 == 3 else f"document {n} of shard {shard} " * (n % 5 + 1) for n in range(documents)]
        path.write_text("".join(json.dumps({"text": text, "title": text[:4]}) + "\n" for text in texts))
        paths.append(path)
    return paths


def job(
    files: Sequence[Path], prefix: Path, load: Callable[[], Tokenizer] = ByteTokenizer, **settings: object
) -> PreprocessJob:
    settings = {"keys": ["text"], **settings}
    return PreprocessJob(files=files, tokenizer=load(), load=load, output_prefix=str(prefix), **settings)  # type: ignore[arg-type]


def output(prefix: Path, key: str = "text") -> tuple[bytes, bytes]:
    return tuple(Path(f"{prefix}_{key}_document{suffix}").read_bytes() for suffix in (".bin", ".idx"))  # type: ignore[return-value]


def megatrons_pair(documents: list[list[int]], code: int, dtype: type) -> tuple[bytes, bytes]:
    """Return the bytes that Megatron's indexed_dataset writes for documents of one sequence, packed by hand."""
    sizes = [len(tokens) for tokens in documents]
    offsets = [sum(sizes[:n]) * np.dtype(dtype).itemsize for n in range(len(sizes))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *offsets)
    index += struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    return np.array([token for tokens in documents for token in tokens], dtype).tobytes(), index


@pytest.mark.parametrize("reference, workers", [(False, 2), (True, 1), (True, 2)])
def test_the_files_equal_those_of_megatron_byte_for_byte(
    reference: bool, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "BATCH_BYTES", 300)
    files = shards(tmp_path)
    settings = {"before": [7, 8], "after": [256], "reference": reference, "workers": workers}
    counts = preprocess.preprocess(job(files, tmp_path / "o", **settings))
    texts = [json.loads(line)["text"] for path in files for line in path.read_text().splitlines()]
    expected = [[7, 8, *text.encode(), 256] for text in texts if text]
    assert output(tmp_path / "o") == megatrons_pair(expected, 8, np.uint16)
    assert (counts.documents, counts.dropped) == (len(expected), texts.count(""))
    assert counts.tokens == sum(map(len, expected))
    names = {"o_text_document.bin", "o_text_document.idx"}
    assert {path.name for path in tmp_path.iterdir()} == names | {file.name for file in files}


def test_ids_of_a_large_vocabulary_take_four_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aé")
    preprocess.preprocess(job([tmp_path / "a.txt"], tmp_path / "o", WideTokenizer, reference=True, check_share=0.0))
    assert output(tmp_path / "o") == megatrons_pair([[300 * byte for byte in "aé".encode()]], 4, np.int32)


def test_a_run_cannot_be_resumed_with_a_changed_input_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "BATCH_BYTES", 500)
    files = shards(tmp_path)
    complete = files[2].read_text()
    files[2].write_text(complete[:-30])
    with pytest.raises(DataError, match=r"02.jsonl:50: not valid JSON"):
        preprocess.preprocess(job(files, tmp_path / "o", keys=["text", "title"]))
    assert not (tmp_path / "o_text_document.bin").exists() and not (tmp_path / "o_text_document.idx").exists()
    files[2].write_text(complete)
    with pytest.raises(DataError, match=r"had different input: .*02.jsonl is another file or has changed"):
        preprocess.preprocess(job(files, tmp_path / "o", keys=["text", "title"], resume=True))


@pytest.mark.parametrize("workers, reference", [(2, False), (2, True)])
def test_a_resumed_run_writes_the_same_files_and_does_not_read_finished_input_again(
    workers: int, reference: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "BATCH_BYTES", 500)
    files = shards(tmp_path)
    files[2].write_bytes(files[2].read_bytes().replace(b"document 9", b"\\ud800"))  # valid JSON, but not valid text
    job_to = partial(job, files, keys=["text", "title"], workers=workers, reference=reference)
    once = preprocess.preprocess(job_to(tmp_path / "once"), reject=lambda error: None)
    with pytest.raises(DataError, match=r"02.jsonl:10: has half of a surrogate pair"):
        preprocess.preprocess(job_to(tmp_path / "o"))
    for path in files[:2]:
        make_unreadable(path)
    counts = preprocess.preprocess(job_to(tmp_path / "o", resume=True), reject=lambda error: None)
    for key in ("text", "title"):
        assert output(tmp_path / "o", key) == output(tmp_path / "once", key)
    assert counts.resumed_files == 2 and counts.skipped == once.skipped == 1
    assert (counts.documents, counts.dropped, counts.tokens) == (once.documents, once.dropped, once.tokens)
    assert counts.text_bytes == once.text_bytes
    assert not list(tmp_path.glob("*.tmp"))


def make_unreadable(path: Path) -> None:
    """Replace the content of a file without changing its size and modification time."""
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_run_without_resume_starts_from_scratch(tmp_path: Path) -> None:
    files = shards(tmp_path)
    files[1].write_text("broken\n")
    with pytest.raises(DataError):
        preprocess.preprocess(job(files, tmp_path / "o"))
    assert list(tmp_path.glob("o*.tmp"))
    preprocess.preprocess(job(files[:1], tmp_path / "o"))
    preprocess.preprocess(job(files[:1], tmp_path / "once"))
    assert output(tmp_path / "o") == output(tmp_path / "once") and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"after": [256]}, "different tokens around a document: .*, not .*256"),
        ({"load": WideTokenizer}, "different tokenizer"),
        ({"keys": ["title"]}, "different keys"),
        ({"files": 3}, "had different input: 4 files, not 3"),
    ],
)
def test_a_run_cannot_be_resumed_with_other_settings(change: dict, message: str, tmp_path: Path) -> None:
    files = shards(tmp_path)
    files[3].write_text("broken\n")
    with pytest.raises(DataError):
        preprocess.preprocess(job(files, tmp_path / "o"))
    files = files[: change.pop("files", 4)]
    with pytest.raises(DataError, match=message):
        preprocess.preprocess(job(files, tmp_path / "o", change.pop("load", ByteTokenizer), resume=True, **change))


def test_temporary_files_that_are_missing_when_a_run_is_resumed_are_named(tmp_path: Path) -> None:
    files = shards(tmp_path)
    files[3].write_text("broken\n")
    with pytest.raises(DataError):
        preprocess.preprocess(job(files, tmp_path / "o"))
    next(tmp_path.glob("o*.tokens.tmp")).unlink()
    with pytest.raises(DataError, match=r"tokens.tmp: missing since the run stopped; run again without --resume"):
        preprocess.preprocess(job(files, tmp_path / "o", resume=True))


def test_a_line_of_the_resume_log_that_a_crash_left_incomplete_is_ignored(tmp_path: Path) -> None:
    log = ResumeLog(tmp_path / "log")
    log.start({"a": 1})
    log.add({"files_done": 1})
    log.close()
    with (tmp_path / "log").open("ab") as file:
        file.write(b'{"files_done": 2')
    reopened = ResumeLog(tmp_path / "log")
    assert reopened.read() == [{"a": 1}, {"files_done": 1}]
    reopened.close()


def test_two_runs_cannot_write_the_same_output(tmp_path: Path) -> None:
    files = shards(tmp_path, 1)
    other_run = ResumeLog(tmp_path / "o.preprocess.tmp")
    with pytest.raises(DataError, match="another run is writing this output"):
        preprocess.preprocess(job(files, tmp_path / "o"))
    other_run.close()
    preprocess.preprocess(job(files, tmp_path / "o"))


def test_a_killed_run_leaves_no_file_with_a_final_name_and_a_resume_point(tmp_path: Path) -> None:
    files = shards(tmp_path)
    # The third shard is a pipe: the run has written two shards when it waits there and is killed.
    files[2].unlink()
    os.mkfifo(files[2])
    code = (
        "import sys; from pathlib import Path\n"
        "from megagpt.data.offline import preprocess; from megagpt.data.tokenizer import ByteTokenizer\n"
        "preprocess.SECONDS_BETWEEN_RESUME_POINTS = 0\n"
        "class PrintedProgress:\n"
        "    def update(self, n):\n"
        "        self.n = getattr(self, 'n', 0) + n; print(self.n, flush=True)\n"
        f"files = sorted(Path({str(tmp_path)!r}).glob('*.jsonl'))\n"
        f"job = preprocess.PreprocessJob(files, ByteTokenizer(), ByteTokenizer, {str(tmp_path / 'o')!r}, ['text'])\n"
        "preprocess.preprocess(job, PrintedProgress())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    two_shards = sum(path.stat().st_size for path in files[:2])
    while int(process.stdout.readline()) < two_shards:
        pass
    with files[2].open("wb") as pipe:  # the run reads from it, after the resume point of two shards was written to disk
        pipe.write(b'{"text": "half of the file"}\n' * 100)
        pipe.flush()
        process.kill()
        process.wait()
    assert not list(tmp_path.glob("o*.bin")) and not list(tmp_path.glob("o*.idx"))
    log = ResumeLog(tmp_path / "o.preprocess.tmp")
    assert log.read()[-1]["files_done"] == 2
    log.close()


def test_a_killed_worker_ends_the_run_with_the_probable_reason(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("kill")
    with pytest.raises(DataError, match="killed, probably because memory ran out"):
        preprocess.preprocess(
            job(sorted(tmp_path.glob("*.txt")), tmp_path / "out" / "o", KilledTokenizer, reference=True, workers=2)
        )
    assert not list((tmp_path / "out").glob("*.bin")) and not list((tmp_path / "out").glob("*.idx"))


def test_a_difference_from_the_reference_library_ends_the_run_and_shows_the_document(tmp_path: Path) -> None:
    files = shards(tmp_path)
    with pytest.raises(DataError, match=r"document 50 \(counted from 0\): .*'document 0 of shard 1 '"):
        preprocess.preprocess(job(files, tmp_path / "o", DifferentTokenizer, check_share=0.1))
    assert not list(tmp_path.glob("o*.bin"))


def test_input_without_a_token_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no document with a token"):
        preprocess.preprocess(job([tmp_path / "a.jsonl"], tmp_path / "out" / "o"))
    assert not list((tmp_path / "out").iterdir())


def test_if_one_key_has_no_token_no_file_is_written_for_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some", "title": ""}\n')
    with pytest.raises(DataError, match=r"o_title_document: not written, nor the other keys"):
        preprocess.preprocess(job([tmp_path / "a.jsonl"], tmp_path / "out" / "o", keys=["text", "title"]))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc of Linux")
def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """The peak memory of a run on 12 times the input, 48 MB of text, is less than 16 MB higher."""
    line = json.dumps({"text": "some text in place of a document here " * 100}) + "\n"
    peaks = []
    for name, lines in (("small", 1_000), ("large", 12_000)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(line * lines)
        code = (
            "import re; from pathlib import Path; from megagpt.commands import preprocess_data\n"
            f"preprocess_data.main(['--input', {str(path)!r}, '--tokenizer', 'byte', '--output-prefix', {str(path)!r}])\n"
            "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        peaks.append(int(result.stdout.splitlines()[-1]) * 1024)
    assert peaks[1] - peaks[0] < 16e6


def test_hftokenizer_adds_the_tokens_of_the_post_processor_as_megatron_does(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "</s>": 1, "<s>": 2, "a": 3, "b": 4}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert isinstance(loaded, HuggingFaceTokenizer) and loaded.framing() == ([2], [])
    (tmp_path / "a.txt").write_text("a b a")
    common = ["--input", str(tmp_path / "a.txt"), "--append-eod", "--output-prefix"]
    flags = ["--tokenizer-type", "HFTokenizer", "--vocab-file", str(tmp_path / "tokenizer.json")]
    assert preprocess_data.main([*common, str(tmp_path / "megatron"), *flags]) == 0
    assert preprocess_data.main([*common, str(tmp_path / "plain"), "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    framed = tokenizer.encode("a b a").ids  # with the tokens of the post-processor
    assert IndexedCorpus(tmp_path / "megatron_text_document").read(0).tolist() == [*framed, 1] == [2, 3, 4, 3, 1]
    assert IndexedCorpus(tmp_path / "plain_text_document").read(0).tolist() == [3, 4, 3, 1]


def test_counts_start_at_zero() -> None:
    assert not any(vars(Counts()).values())
