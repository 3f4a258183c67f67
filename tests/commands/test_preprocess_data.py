"""Text to tokens by the command: the reference library's ids, in order, whatever the number of workers."""

import json
from pathlib import Path

import pytest

from megagpt.commands import preprocess_data, train_tokenizer
from megagpt.data.indexed import IndexedCorpus
from megagpt.data.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
TEXTS = [
    "Hello world",
    "",
    "Grüße, 世界!\n\ttabs  and   spaces",
    "a" * 300,
    "日本語 \U0001f600 <|endoftext|>",
    "x = {'y': 1}\n",
]


def jsonl(folder: Path, lines: int = 40) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text(
        "".join(json.dumps({"text": TEXTS[i % len(TEXTS)] + str(i) * (i % 6 != 1), "n": i}) + "\n" for i in range(lines))
    )
    return path


def documents(prefix: Path) -> list[list[int]]:
    corpus = IndexedCorpus(prefix)
    return [[int(token) for token in corpus.read(i)] for i in range(len(corpus.sizes))]


def test_bytes_come_back_with_the_end_of_document_and_empty_ones_are_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = jsonl(tmp_path)
    assert (
        preprocess_data.main(
            ["--input", str(path), "--tokenizer", "byte", "--output-prefix", str(tmp_path / "o"), "--append-eod"]
        )
        == 0
    )
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert documents(tmp_path / "o_text_document") == [[*text.encode(), 256] for text in texts if text]
    assert f"{texts.count('')} empty ones dropped" in capsys.readouterr().out


def test_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megagpt.data.offline.preprocess.BATCH_BYTES", 200)
    path = jsonl(tmp_path, 100)
    for workers in ("1", "3"):
        arguments = [
            "--input",
            str(path),
            "--tokenizer",
            "byte",
            "--output-prefix",
            str(tmp_path / workers),
            "--workers",
            workers,
        ]
        assert preprocess_data.main(arguments) == 0
    for suffix in (".bin", ".idx"):
        one, three = ((tmp_path / f"{workers}_text_document{suffix}").read_bytes() for workers in "13")
        assert one == three


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")
def test_gpt2_ids_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    files = SHARED / "gpt2"
    reference = transformers.GPT2Tokenizer(vocab=str(files / "vocab.json"), merges=str(files / "merges.txt"))
    path = jsonl(tmp_path)
    arguments = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(files / "vocab.json")]
    arguments += ["--merge-file", str(files / "merges.txt")]
    assert preprocess_data.main(["--input", str(path), *arguments, "--output-prefix", str(tmp_path / "o")]) == 0
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert documents(tmp_path / "o_text_document") == [
        reference(text, split_special_tokens=True)["input_ids"] for text in texts if text
    ]


def test_a_trained_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    source = tmp_path / "code.py"
    source.write_text(Path(__file__).read_text() * 3)
    model = tmp_path / "tok"
    assert train_tokenizer.main(["--input", str(source), "--output", str(model), "--vocab-size", "400"]) == 0
    tokenizer = load_tokenizer(f"{model}.model")
    assert tokenizer.vocab_size == 400
    for text in [*TEXTS, source.read_text(), "  two\n\n\n    four \r\n"]:
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "nowhere*.txt", "--tokenizer", "byte"], "nowhere"),
        (["--input", "broken.jsonl", "--tokenizer", "byte"], "broken.jsonl:2: not valid JSON"),
        (
            ["--input", "broken.jsonl", "--tokenizer", "byte", "--json-keys", "body"],
            "no key 'body'; nearest: 'text'",
        ),
        (["--input", "latin.txt", "--tokenizer", "byte"], "latin.txt: not UTF-8"),
        (["--input", "latin.txt", "--tokenizer", "gone.model"], "gone.model: no such tokenizer"),
        (["--input", "latin.txt"], "give either --tokenizer PATH, or --tokenizer-type"),
        (["--input", "latin.txt", "--tokenizer", "byte", "--split-sentences"], "leave it out"),
        (["--input", "latin.txt", "--tokenizer-type", "GPT2BPETokenizer"], "needs --vocab-file"),
    ],
)
def test_wrong_inputs_end_in_one_line_and_leave_nothing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    assert preprocess_data.main([*arguments, "--output-prefix", "out/o"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(Path().glob("out/*"))
