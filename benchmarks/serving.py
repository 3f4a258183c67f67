"""Many clients at once at tools/serve.py, with a small model: latencies, lost requests, and the server's memory.

python benchmarks/serving.py --clients 200

A LLaMA with random weights is served on the CPU by a process of its own; the clients are the package openai's, in this
process, all starting together. Every answer is a stream. Rounds after the first show whether memory grows. Needs transformers
and openai.
"""

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import openai
import torch
import transformers

ROOT = Path(__file__).parents[1]

SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 704}
PROMPT = "Request number {} is a text of about sixty characters, or bytes. "
SHARES = {"median": 0.5, "95%": 0.95, "99%": 0.99, "largest": 1.0}


class Answer(NamedTuple):
    """What one client saw; times in seconds from its request."""

    first_text: float
    end: float
    tokens: int
    reason: str | None
    """Why the text ended; None if the stream broke off."""


def main() -> None:
    """Print a table of latencies for each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200, help="requests at the same time (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="--batch of the server (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all clients (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder)
        command = [sys.executable, "tools/serve.py", "--checkpoint", folder, "--tokenizer", "byte", "--name", "small"]
        command += ["--port", "0", "--batch", str(args.batch), "--max-queue", str(args.clients)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment) as server:
            try:
                run_rounds(wait_for_url(server), server.pid, args)
            finally:
                server.terminate()


def write_model(folder: str) -> None:
    """Write a folder of a Hugging Face model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=257, max_position_embeddings=512, num_key_value_heads=4, **SHAPE)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def wait_for_url(server: "subprocess.Popen[str]") -> str:
    """Return the address that the server prints when it is ready."""
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"http://\S+", line):
            return f"{found[0]}/v1"
    raise SystemExit("the server did not start")


def run_rounds(url: str, pid: int, args: argparse.Namespace) -> None:
    """Run all rounds and print their figures."""
    print(f"{args.clients} clients, {args.tokens} tokens each, {args.batch} texts in a batch")
    for number in range(1, args.rounds + 1):
        start = time.perf_counter()
        results = asyncio.run(all_clients(url, args.clients, args.tokens))
        seconds = time.perf_counter() - start
        answers = [result for result in results if isinstance(result, Answer)]
        complete = [answer for answer in answers if answer.reason in ("stop", "length")]
        print(
            f"round {number}: {len(complete)} complete answers, {len(results) - len(complete)} lost, {seconds:.1f} s, "
            f"{sum(answer.tokens for answer in answers) / seconds:,.0f} tokens/s, server's memory {resident_mib(pid):,.0f} MiB"
        )
        for name in ("first_text", "end"):
            times = sorted(getattr(answer, name) for answer in answers)
            shares = [f"{label} {times[round(share * (len(times) - 1))]:.2f} s" for label, share in SHARES.items()]
            print(f"  time to {name.replace('_', ' ')}: {', '.join(shares)}", flush=True)


async def all_clients(url: str, number: int, tokens: int) -> list["Answer | BaseException"]:
    """Ask all questions at the same time."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        tasks = [one_client(client, index, tokens) for index in range(number)]
        return list(await asyncio.gather(*tasks, return_exceptions=True))


async def one_client(client: openai.AsyncOpenAI, index: int, tokens: int) -> Answer:
    """Ask one question and read the stream to its end."""
    start = time.perf_counter()
    first: float | None = None
    used, reason = 0, None
    stream = await client.completions.create(
        model="small",
        prompt=PROMPT.format(index),
        max_tokens=tokens,
        seed=index,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        first = first or time.perf_counter() - start
        used = chunk.usage.completion_tokens if chunk.usage else used
        reason = chunk.choices[0].finish_reason or reason if chunk.choices else reason
    return Answer(first or 0.0, time.perf_counter() - start, used, reason)


def resident_mib(pid: int) -> float:
    """Return the memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


if __name__ == "__main__":
    main()
