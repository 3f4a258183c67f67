"""Compare text-to-token programs on one file: megagpt, gigatoken alone, Hugging Face's tokenizers alone.

    python benchmarks/preprocess.py --tokenizer ../shared/data/gpt2 --input corpus.jsonl
    python benchmarks/preprocess.py --tokenizer ../shared/data/gpt2 --megabytes 30

The time is that of the entire process. gigatoken alone reads and encodes the file and writes nothing. It is the lower bound
for megagpt, which also parses in Python, compares a sample with the reference library and writes the pair of files. The
programs run in turn, so that a change in the speed of the machine affects all of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
GIGATOKEN = """
import sys, gigatoken
from megagpt.data.tokenizer import load_tokenizer
tokenizer = gigatoken.Tokenizer.from_json(load_tokenizer(sys.argv[1]).to_json())
print(len(tokenizer.encode_files(gigatoken.JsonlFileSource([sys.argv[2]]))), "documents")
"""
TOKENIZERS = """
import sys, json
from megagpt.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2], "rb")]
print(sum(len(tokenizer.encode_batch(texts[first : first + 1000])) for first in range(0, len(texts), 1000)), "documents")
"""


def main() -> None:
    """Print median and minimum time of each program, and its rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder with vocab.json and merges.txt, or a tokenizer.json")
    parser.add_argument("--input", help="a .jsonl (default: one of the text files of the Python installation)")
    parser.add_argument("--megabytes", type=int, default=30, help="size of the default input, in 10^6 bytes")
    parser.add_argument("--runs", type=int, default=5, help="runs of megagpt and of gigatoken")
    parser.add_argument("--reference-runs", type=int, default=1, help="runs of Hugging Face's tokenizers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.input) if args.input else write_corpus(Path(folder) / "corpus.jsonl", args.megabytes * 10**6)
        megagpt = [str(ROOT / "tools" / "preprocess_data.py"), "--input", str(path), "--tokenizer", args.tokenizer]
        megagpt += ["--append-eod", "--overwrite", "--output-prefix", str(Path(folder) / "out")]
        programs = {
            "megagpt": (megagpt, args.runs),
            "gigatoken alone": (["-c", GIGATOKEN, args.tokenizer, str(path)], args.runs),
            "tokenizers alone": (["-c", TOKENIZERS, args.tokenizer, str(path)], args.reference_runs),
        }
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for turn in range(args.runs):
            for name, (command, runs) in programs.items():
                if turn < runs:
                    seconds[name].append(run(command))
        report(seconds, path.stat().st_size)


def report(seconds: dict[str, list[float]], n_bytes: int) -> None:
    """Print one line for each program."""
    bound = statistics.median(seconds["gigatoken alone"])
    for name, times in seconds.items():
        if not times:
            continue
        median = statistics.median(times)
        print(
            f"{name}: median {median:.2f} s, minimum {min(times):.2f} s of {len(times)} runs, "
            f"{n_bytes / median / 1e6:.1f} MB/s, {median / bound:.2f} times gigatoken alone"
        )


def run(command: list[str]) -> float:
    """Return the seconds of a Python process from start to end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def write_corpus(path: Path, n_bytes: int) -> Path:
    """Write the source and text files of the Python installation as documents, repeated if `n_bytes` needs it."""
    roots = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    files = sorted(file for root in roots for kind in ("py", "txt", "md", "rst") for file in Path(root).rglob(f"*.{kind}"))
    written = 0
    with path.open("w", encoding="utf-8") as output:
        while written < n_bytes:
            for file in files:
                text = file.read_text(encoding="utf-8", errors="ignore")[:20_000]
                written += output.write(json.dumps({"text": text, "file": str(file)}) + "\n")
                if written >= n_bytes:
                    break
    return path


if __name__ == "__main__":
    main()
