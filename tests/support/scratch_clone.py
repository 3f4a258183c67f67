"""A folder like a clone of the repository, with small data and models under the names that the documentation uses."""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow
import tokenizers

from megagpt.commands.train_tokenizer import train_bpe
from megagpt.config import load_config, to_json
from megagpt.data.indexed import IndexedWriter
from support.chat import chat_tokenizer
from support.commands import BIN, ENVIRONMENT, ROOT

LINKS = (
    "megagpt",
    "tools",
    "examples",
    "benchmarks",
    "pretrain_gpt.py",
    "pretrain_t5.py",
    "finetune_classifier.py",
    "setup.py",
)
SMALL_MODEL = ("model.n_embd=32", "model.n_head=8", "model.n_positions=32", "model.ffn_hidden=null")
QUICK_RUN = (
    "model.n_layer=2",
    "training.steps=25",
    "training.micro_batch_size=4",
    "training.global_batch_size=8",
    "optimizer.learning_rate=1e-2",
    "lr_schedule.warmup_steps=5",
    "evaluation.samples=16",
)
"""Turns the quickstart's config into a run of seconds that learns `_write_lines`."""
DOCUMENTS = 1000
"""Enough for a share of one document of 969,30,1."""
LONG_WORDS = 3000
"""The last document is long enough for one sample of 2,049 tokens."""


def build_clone(folder: Path) -> None:
    """Fill `folder`: code, configs, data, and a config and a text for a small quickstart."""
    for name in LINKS:
        (folder / name).symlink_to(ROOT / name)
    for name in ("configs", "data", "docs"):
        (folder / name).mkdir()
    for config in (ROOT / "configs").glob("*.json"):
        (folder / "configs" / config.name).write_text(config.read_text())
    _write_data(folder / "data", folder)
    config = load_config(ROOT / "configs" / "quickstart.json", [*SMALL_MODEL, *QUICK_RUN])
    (folder / "configs" / "quickstart.json").write_text(to_json(config))
    _write_lines(folder / "notes")
    write_base_model(folder / "models" / "base")
    for name in ("chats", "held_out"):
        (folder / f"{name}.jsonl").write_text('{"prompt": "the fox?", "response": "yes"}\n' * 20)
    for path in (folder / "summaries.jsonl", folder / "data" / "held_out.jsonl"):
        path.write_text('{"source": "the quick fox jumps", "target": "a fox"}\n' * 20)


def write_base_model(folder: Path, n_positions: int = 32) -> None:
    """Write a Hugging Face model in the size of `SMALL_MODEL`, with a chat template."""
    import transformers  # only this needs it, and importing it takes seconds

    chat_tokenizer(folder, vocab_size=300)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        initializer_range=0.5,  # so that adapters alone can learn answers
        max_position_embeddings=n_positions,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def _words(number: int) -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices("abcdefghijklmnoprstuvwz", k=generator.randint(3, 9))) for _ in range(number)]


def _write_lines(folder: Path) -> None:
    """Write a text that a small model learns in a few steps; it has enough words for the quickstart's vocabulary."""
    folder.mkdir()
    generator, words = random.Random(1), _words(4000)
    for number in range(200):
        lines = [f"def next_value(self, number): return number + 1  # {generator.choice(words)}\n" for _ in range(20)]
        (folder / f"{number}.txt").write_text("".join(lines))


def _write_data(data: Path, folder: Path) -> None:
    """Write texts, token files and tokenizers."""
    generator, words = random.Random(2), _words(200)
    texts = [" ".join(generator.choices(words, k=40)) + ".\n" for _ in range(DOCUMENTS)]
    texts[-1] = " ".join(generator.choices(words, k=LONG_WORDS))
    (data / "text").mkdir()
    for number, text in enumerate(texts):
        (data / "text" / f"{number:04d}.txt").write_text(text)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "novel.txt").write_text("\n\n".join(texts))
    (data / "prompts.txt").write_text("".join(texts[:3]))
    with pyarrow.output_stream(str(data / "web.jsonl.zst"), compression="zstd") as file:
        file.write((folder / "corpus.jsonl").read_bytes())
    _write_gpt2_tokenizer(data / "gpt2", texts)
    (data / "tokenizer.model").write_bytes(train_bpe(texts, 400, 0.9995))
    for name in ("corpus", "my_corpus", "valid", "web"):
        _write_pair(data / f"{name}_text_document", DOCUMENTS)
    for part in range(2):
        _write_pair(data / f"part_{part}_text_document", 20)


def _write_pair(prefix: Path, documents: int) -> None:
    """Write documents of random tokens, some much more frequent than others; the last one is longer than 2,049 tokens."""
    sizes = np.full(documents, 80)
    sizes[-1] = LONG_WORDS
    tokens = np.random.default_rng(0).geometric(0.03, int(sizes.sum())).clip(max=290).astype(np.uint16)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add_documents(tokens, sizes)


def _write_gpt2_tokenizer(folder: Path, texts: list[str]) -> None:
    folder.mkdir()
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer.save_model(str(folder))


def stand_ins(folder: Path) -> dict[str, str]:
    """Write programs that record their arguments to `folder`/calls, and return an environment where they come first.

    They stand for launchers, which a script starts, and for the commands of SLURM.
    """
    folder.mkdir()
    record = f"#!{sys.executable}\nimport json, sys\nopen({str(folder / 'calls')!r}, 'a').write(json.dumps(sys.argv) + '\\n')\n"
    for name in ("deepspeed", "torchrun", "srun"):
        (folder / name).write_text(record)
    (folder / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    for program in folder.iterdir():
        program.chmod(0o755)
    return ENVIRONMENT | {"PATH": os.pathsep.join([str(folder), str(BIN), os.environ["PATH"]])}


def enter(folder: str, rank: int) -> None:
    """Change to a folder, in a rank before its work."""
    os.chdir(folder)
