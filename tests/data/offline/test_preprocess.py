"""Whole runs: the bytes that the peers write, whatever the workers; runs that stop and go on."""

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

from megagpt.data.indexed import IndexedCorpus
from megagpt.data.offline import encode, preprocess
from megagpt.data.offline.preprocess import Counts, Job
from megagpt.data.offline.resume_log import Journal
from megagpt.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megagpt.errors import DataError


class KilledTokenizer(ByteTokenizer):
    """Ends its process as the kernel does that of one which takes too much memory."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if any("kill" in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_batch(texts)


class WideTokenizer(ByteTokenizer):
    """A vocabulary that needs four bytes a token."""

    vocab_size = 70_000

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[300 * byte for byte in text.encode()] for text in texts]


def shards(folder: Path, n_shards: int = 4, documents: int = 50) -> list[Path]:
    """Files of JSON lines, every seventh document empty."""
    paths = []
    for shard in range(n_shards):
        path = folder / f"{shard:02}.jsonl"
        texts = ["" if n % 7 == 3 else f"document {n} of shard {shard} " * (n % 5 + 1) for n in range(documents)]
        path.write_text("".join(json.dumps({"text": text, "title": text[:4]}) + "\n" for text in texts))
        paths.append(path)
    return paths


def job(files: Sequence[Path], prefix: Path, load: Callable[[], Tokenizer] = ByteTokenizer, **more: object) -> Job:
    return Job(files=files, tokenizer=load(), load=load, output_prefix=str(prefix), **{"keys": ["text"], **more})  # type: ignore[arg-type]


def output(prefix: Path, key: str = "text") -> tuple[bytes, bytes]:
    return tuple(Path(f"{prefix}_{key}_document{suffix}").read_bytes() for suffix in (".bin", ".idx"))  # type: ignore[return-value]


def peers_pair(documents: list[list[int]], code: int, dtype: type) -> tuple[bytes, bytes]:
    """What Megatron's indexed_dataset writes for documents of one sequence: the format's description, spelt out."""
    sizes = [len(tokens) for tokens in documents]
    starts = [sum(sizes[:n]) * np.dtype(dtype).itemsize for n in range(len(sizes))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *starts)
    index += struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    return np.array([token for tokens in documents for token in tokens], dtype).tobytes(), index


@pytest.mark.parametrize("reference, workers", [(False, 2), (True, 1), (True, 2)])
def test_the_files_are_byte_for_byte_those_of_the_format(reference: bool, workers: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(preprocess, "BATCH_BYTES", 300)
    files = shards(tmp_path)
    run = job(files, tmp_path / "o", before=[7, 8], after=[256], reference=reference, workers=workers)
    counts = preprocess.preprocess(run)
    texts = [json.loads(line)["text"] for path in files for line in path.read_text().splitlines()]
    expected = [[7, 8, *text.encode(), 256] for text in texts if text]
    assert output(tmp_path / "o") == peers_pair(expected, 8, np.uint16)
    assert (counts.documents, counts.dropped) == (len(expected), texts.count(""))
    assert counts.tokens == sum(map(len, expected))
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f.name for f in files),
        "o_text_document.bin",
        "o_text_document.idx",
    }


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aé")
    preprocess.preprocess(job([tmp_path / "a.txt"], tmp_path / "o", WideTokenizer, reference=True, check_share=0.0))
    assert output(tmp_path / "o") == peers_pair([[300 * byte for byte in "aé".encode()]], 4, np.int32)


def test_a_broken_shard_stops_the_run_which_goes_on_after_the_last_whole_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(preprocess, "BATCH_BYTES", 500)
    files = shards(tmp_path)
    whole = files[2].read_text()
    preprocess.preprocess(job(files, tmp_path / "once", keys=["text", "title"]))
    files[2].write_text(whole[:-30])
    with pytest.raises(DataError, match=r"02.jsonl:50: not valid JSON"):
        preprocess.preprocess(job(files, tmp_path / "o", keys=["text", "title"]))
    assert not (tmp_path / "o_text_document.bin").exists() and not (tmp_path / "o_text_document.idx").exists()
    files[2].write_text(whole)
    with pytest.raises(DataError, match=r"had other input: .*02.jsonl is another or has changed since"):
        preprocess.preprocess(job(files, tmp_path / "o", keys=["text", "title"], resume=True))


@pytest.mark.parametrize("workers, reference", [(2, False), (2, True)])
def test_a_run_that_stops_and_goes_on_writes_what_one_run_writes(
    workers: int, reference: bool, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(preprocess, "BATCH_BYTES", 500)
    files = shards(tmp_path)
    files[2].write_bytes(files[2].read_bytes().replace(b"document 9", b"\\ud800"))  # read well, but no text
    make = partial(job, files, keys=["text", "title"], workers=workers, reference=reference)
    with pytest.raises(DataError, match=r"02.jsonl:10: has half of a surrogate pair"):
        preprocess.preprocess(make(tmp_path / "o"))
    read: list[str] = []
    original = preprocess.InputFile
    monkeypatch.setattr(preprocess, "InputFile", lambda path, *rest: read.append(path.name) or original(path, *rest))
    counts = preprocess.preprocess(make(tmp_path / "o", resume=True), reject=lambda error: None)
    assert read == ["02.jsonl", "03.jsonl"] and counts.resumed_files == 2 and counts.skipped == 1
    once = preprocess.preprocess(make(tmp_path / "once"), reject=lambda error: None)
    for key in ("text", "title"):
        assert output(tmp_path / "o", key) == output(tmp_path / "once", key)
    assert (counts.documents, counts.dropped, counts.tokens, counts.text_bytes) == (
        once.documents,
        once.dropped,
        once.tokens,
        once.text_bytes,
    )
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_without_resume_begins_anew(tmp_path: Path) -> None:
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
        ({"after": [256]}, "another tokens around a document: .*, not .*256"),
        ({"load": WideTokenizer}, "another tokenizer"),
        ({"keys": ["title"]}, "another keys"),
        ({"files": 3}, "had other input: 4 files, not 3"),
    ],
)
def test_a_resumed_run_has_the_settings_of_the_one_that_stopped(change: dict, message: str, tmp_path: Path) -> None:
    files = shards(tmp_path)
    files[3].write_text("broken\n")
    with pytest.raises(DataError):
        preprocess.preprocess(job(files, tmp_path / "o"))
    files = files[: change.pop("files", 4)]
    with pytest.raises(DataError, match=message):
        preprocess.preprocess(job(files, tmp_path / "o", change.pop("load", ByteTokenizer), resume=True, **change))


def test_files_that_vanished_between_the_runs_are_named(tmp_path: Path) -> None:
    files = shards(tmp_path)
    files[3].write_text("broken\n")
    with pytest.raises(DataError):
        preprocess.preprocess(job(files, tmp_path / "o"))
    next(tmp_path.glob("o*.tokens.tmp")).unlink()
    with pytest.raises(DataError, match=r"tokens.tmp: gone since the run stopped; run again without --resume"):
        preprocess.preprocess(job(files, tmp_path / "o", resume=True))


def test_a_journal_line_cut_short_by_a_crash_counts_for_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.start({"a": 1})
    journal.add({"files_done": 1})
    journal.close()
    with (tmp_path / "j").open("ab") as file:
        file.write(b'{"files_done": 2')
    again = Journal(tmp_path / "j")
    assert again.read() == [{"a": 1}, {"files_done": 1}]
    again.close()


def test_two_runs_cannot_write_the_same_output(tmp_path: Path) -> None:
    files = shards(tmp_path, 1)
    held = Journal(tmp_path / "o.preprocess.tmp")
    with pytest.raises(DataError, match="another run is writing this output"):
        preprocess.preprocess(job(files, tmp_path / "o"))
    held.close()
    preprocess.preprocess(job(files, tmp_path / "o"))


def test_a_killed_run_leaves_nothing_under_the_final_name_and_goes_on(tmp_path: Path) -> None:
    files = shards(tmp_path)
    # A pipe in place of the third shard: the run has written two when it waits there, and is killed.
    files[2].unlink()
    os.mkfifo(files[2])
    code = (
        "import sys; from pathlib import Path\n"
        "from megagpt.data import preprocess; from megagpt.data.tokenizer import ByteTokenizer\n"
        "preprocess.SECONDS_BETWEEN_POINTS = 0\n"
        "class Told:\n"
        "    def update(self, n):\n"
        "        self.n = getattr(self, 'n', 0) + n; print(self.n, flush=True)\n"
        f"files = sorted(Path({str(tmp_path)!r}).glob('*.jsonl'))\n"
        f"job = preprocess.Job(files, ByteTokenizer(), ByteTokenizer, {str(tmp_path / 'o')!r}, ['text'])\n"
        "preprocess.preprocess(job, Told())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    two = sum(path.stat().st_size for path in files[:2])
    while int(process.stdout.readline()) < two:
        pass
    with files[2].open("wb") as pipe:  # it reads; the point after two files was on the disk before
        pipe.write(b'{"text": "half of it"}\n' * 100)
        pipe.flush()
        process.kill()
        process.wait()
    assert not list(tmp_path.glob("o*.bin")) and not list(tmp_path.glob("o*.idx"))
    journal = Journal(tmp_path / "o.preprocess.tmp")
    assert journal.read()[-1]["files_done"] == 2
    journal.close()


def test_a_killed_worker_ends_the_run_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("kill")
    with pytest.raises(DataError, match="killed, probably for want of memory"):
        preprocess.preprocess(
            job(sorted(tmp_path.glob("*.txt")), tmp_path / "out" / "o", KilledTokenizer, reference=True, workers=2)
        )
    assert not list((tmp_path / "out").glob("*.bin")) and not list((tmp_path / "out").glob("*.idx"))


def test_a_difference_from_the_reference_library_ends_the_run_with_the_document(tmp_path: Path, monkeypatch) -> None:
    class Off(encode.ByteEncoder):
        def __call__(self, texts: list[bytes]) -> encode.Encoded:
            encoded = super().__call__(texts)
            return encode.Encoded(encoded.ids ^ np.uint8(sum(b"shard 1 " in text for text in texts) > 0), encoded.sizes)

    monkeypatch.setattr(preprocess, "fast_encoder", lambda tokenizer, threads: Off())
    files = shards(tmp_path)
    with pytest.raises(DataError, match=r"document 50 \(from 0\): .*'document 0 of shard 1 '"):
        preprocess.preprocess(job(files, tmp_path / "o", check_share=0.1))
    assert not list(tmp_path.glob("o*.bin"))


def test_input_without_a_token_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no document with a token"):
        preprocess.preprocess(job([tmp_path / "a.jsonl"], tmp_path / "out" / "o"))
    assert not list((tmp_path / "out").iterdir())


def test_a_key_without_a_token_leaves_no_file_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some", "title": ""}\n')
    with pytest.raises(DataError, match=r"o_title_document: not written, nor the other keys"):
        preprocess.preprocess(job([tmp_path / "a.jsonl"], tmp_path / "out" / "o", keys=["text", "title"]))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_more_input_takes_no_more_memory(tmp_path: Path) -> None:
    """The peak of a run on 12 times the input, which is 48 MB of text, is higher by less than 16 MB."""
    line = json.dumps({"text": "some text that stands for a document " * 100}) + "\n"
    peaks = []
    for name, lines in (("small", 1_000), ("large", 12_000)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(line * lines)
        code = (
            "import re; from pathlib import Path; from megagpt.commands import preprocess_data\n"
            f"preprocess_data.main(['--input', {str(path)!r}, '--tokenizer', 'byte', '--output-prefix', {str(path)!r}])\n"
            "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
        peaks.append(int(done.stdout.splitlines()[-1]) * 1024)
    assert peaks[1] - peaks[0] < 16e6


def test_a_post_processor_frames_documents_as_the_peers_tokenizers_do(tmp_path: Path) -> None:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "</s>": 1, "<s>": 2, "a": 3, "b": 4}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert isinstance(loaded, HuggingFaceTokenizer) and loaded.framing() == ([2], [])
    (tmp_path / "a.txt").write_text("a b a")
    from megagpt.commands import preprocess_data

    common = ["--input", str(tmp_path / "a.txt"), "--append-eod", "--output-prefix"]
    flags = ["--tokenizer-type", "HFTokenizer", "--vocab-file", str(tmp_path / "tokenizer.json")]
    assert preprocess_data.main([*common, str(tmp_path / "peer"), *flags]) == 0
    assert preprocess_data.main([*common, str(tmp_path / "own"), "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    framed = tokenizer.encode("a b a").ids  # what the peers write: the post-processor's tokens and the end of document
    assert IndexedCorpus(tmp_path / "peer_text_document").read(0).tolist() == [*framed, 1] == [2, 3, 4, 3, 1]
    assert IndexedCorpus(tmp_path / "own_text_document").read(0).tolist() == [3, 4, 3, 1]


def test_counts_start_at_nothing() -> None:
    assert not any(vars(Counts()).values())
