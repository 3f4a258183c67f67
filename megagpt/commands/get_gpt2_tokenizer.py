"""tools/get_gpt2_tokenizer.py: get the two files of GPT-2's tokenizer, vocab.json and merges.txt, and verify them."""

import argparse
import hashlib
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from megagpt.commands import shell
from megagpt.errors import DataError

EXAMPLE = """examples:
  python tools/get_gpt2_tokenizer.py
  python tools/get_gpt2_tokenizer.py --from /media/usb/gpt2
The first downloads 1.5 MB to data/gpt2, which the shipped configs name as data.tokenizer. The second needs no network: it
copies the files that another machine has downloaded. Files whose SHA-256 is not that of OpenAI's are refused."""
TIMEOUT = 30.0
"""Seconds without an answer until the next address is tried."""
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
HUGGING_FACE = "https://huggingface.co/openai-community/gpt2/resolve/main"


class TokenizerFile(NamedTuple):
    """A file of the tokenizer."""

    name: str
    """Name that megagpt and Hugging Face use."""
    openai_name: str
    sha256: str
    """As in OpenAI's tiktoken (tiktoken_ext/openai_public.py)."""
    urls: tuple[str, ...]
    """Addresses, tried in this order."""


FILES = (
    TokenizerFile(
        "vocab.json",
        "encoder.json",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        (f"{OPENAI}/encoder.json", f"{HUGGING_FACE}/vocab.json"),
    ),
    TokenizerFile(
        "merges.txt",
        "vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        (f"{OPENAI}/vocab.bpe", f"{HUGGING_FACE}/merges.txt"),
    ),
)


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("get_gpt2_tokenizer", __doc__, EXAMPLE)
    parser.add_argument(
        "--output", type=Path, default=Path("data/gpt2"), metavar="FOLDER", help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--from",
        type=Path,
        dest="source",
        metavar="FOLDER",
        help="copy the files from this folder instead of downloading them; OpenAI's names, encoder.json and vocab.bpe, are "
        "accepted too",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return shell.run(_get, create_parser(), argv)


def _get(args: argparse.Namespace) -> None:
    for file in FILES:
        path = args.output / file.name
        if path.is_file() and _sha256(path.read_bytes()) == file.sha256:
            print(f"{path}: complete already")
            continue
        content = copied(file, args.source) if args.source else downloaded(file)
        try:
            args.output.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            raise DataError(f"--output {args.output}: cannot be written: {error.strerror}") from None
        print(f"{path}: {len(content):,} bytes, SHA-256 verified")
    print(f"in a config: data.tokenizer = {args.output}")


def copied(file: TokenizerFile, folder: Path) -> bytes:
    """Return the content of the file in `folder`. Raises DataError if it is missing or another file."""
    for path in (folder / file.name, folder / file.openai_name):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"--from {folder}: {path.name} cannot be read: {error.strerror}") from None
        if _sha256(content) == file.sha256:
            return content
        raise DataError(f"{path}: not OpenAI's file: its SHA-256 is {_sha256(content)}; expected {file.sha256}")
    raise DataError(f"--from {folder}: has no {file.name}, or {file.openai_name} as OpenAI names it")


def downloaded(file: TokenizerFile) -> bytes:
    """Return the content of the file from the first address that has it. Raises DataError with the reason of each."""
    problems = []
    for url in file.urls:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                content = answer.read()
        except (OSError, HTTPException) as error:  # urllib's errors are OSErrors
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            problems.append(f"{url}: {getattr(reason, 'strerror', None) or reason}")
            continue
        if _sha256(content) == file.sha256:
            return content
        problems.append(f"{url}: its SHA-256 is {_sha256(content)}, expected {file.sha256}")
    raise DataError(
        f"{file.name}: cannot be downloaded: {'; '.join(problems)}. Without a network, get the files on another machine, copy "
        "them here and use --from FOLDER"
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
