"""Tokens per second of text generation on a CPU: with the cache, without it, and by transformers on the same weights.

python benchmarks/generation.py

A LLaMA with random weights is built by transformers and loaded from its folder. All sides continue the same prompts greedily in
fp32, and must give the same tokens. Needs transformers.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

from megagpt.inference.engine import GenerationEngine
from megagpt.inference.load import load_hugging_face
from megagpt.inference.sampling import Sampling
from megagpt.model.gpt import GPTChunk

PROMPT_TOKENS = 32
SHAPE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1408}


def main() -> None:
    """Print one line for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of each text (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="texts at a time (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of this many runs counts (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192, num_key_value_heads=4, max_position_embeddings=1024, initializer_range=0.05, **SHAPE
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, _ = load_hugging_face(Path(folder))
    assert isinstance(ours, GPTChunk)
    print(f"{sum(p.numel() for p in ours.parameters()) / 1e6:.0f}M parameters, {args.threads} thread(s), tokens per second")
    for batch in args.batches:
        prompts = torch.randint(0, 8192, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
        compare(ours, theirs, prompts, args.tokens, args.repeats)


def compare(ours: GPTChunk, theirs: Any, prompts: torch.Tensor, tokens: int, repeats: int) -> None:
    """Time the three sides and print the tokens per second of all texts together."""
    with_cache, new = fastest(lambda: engine_tokens(ours, prompts, tokens), repeats)
    of_transformers, expected = fastest(lambda: transformers_tokens(theirs, prompts, tokens), repeats)
    assert new == expected, "the tokens differ"
    parts = {"megagpt": with_cache, "transformers": of_transformers}
    if len(prompts) == 1:
        parts["megagpt without cache"], uncached = fastest(lambda: uncached_tokens(ours, prompts, tokens), 1)
        assert uncached == expected, "the tokens differ"
    speeds = [f"{name} {len(prompts) * tokens / seconds:,.1f}" for name, seconds in parts.items()]
    print(f"batch {len(prompts)}, {tokens} new tokens: {', '.join(speeds)}", flush=True)


def fastest(run: Callable[[], list[list[int]]], repeats: int) -> tuple[float, list[list[int]]]:
    """Return the seconds of the fastest run, and the result."""
    seconds, result = float("inf"), []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, result


def engine_tokens(model: GPTChunk, prompts: torch.Tensor, tokens: int) -> list[list[int]]:
    """Return the new tokens of the engine."""
    engine = GenerationEngine(model, (), None, len(prompts) * (PROMPT_TOKENS + tokens + 16), len(prompts))
    sequences = [engine.add(prompt, Sampling(tokens, temperature=0)) for prompt in prompts.tolist()]
    while engine.n_running or engine.n_waiting:
        engine.step()
    return [sequence.tokens[PROMPT_TOKENS:] for sequence in sequences]


@torch.inference_mode()
def transformers_tokens(model: Any, prompts: torch.Tensor, tokens: int) -> list[list[int]]:
    """Return the new tokens of transformers, which has a cache too."""
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    new: list[list[int]] = out[:, PROMPT_TOKENS:].tolist()
    return new


@torch.inference_mode()
def uncached_tokens(model: GPTChunk, prompts: torch.Tensor, tokens: int) -> list[list[int]]:
    """Return the new tokens of full forwards."""
    texts = prompts
    for _ in range(tokens):
        texts = torch.cat((texts, model.logits(texts)[:, -1].argmax(-1, keepdim=True)), 1)
    new: list[list[int]] = texts[:, PROMPT_TOKENS:].tolist()
    return new


if __name__ == "__main__":
    main()
