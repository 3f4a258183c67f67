"""The entire training step of megagpt beside Hugging Face's model: one process, same shape, alternating, ratio of medians.

megagpt's steps are those of a real run (`Trainer.train`): data from a memory-mapped corpus, DeepSpeed ZeRO-1, clipping,
fused AdamW, a log line every step. Hugging Face's are GPT2LMHeadModel, LlamaForCausalLM or T5ForConditionalGeneration with
torch's fused AdamW and clip_grad_norm_, on a batch already in memory. One runs after each log line of the other. Seconds per
step, in fp32.

  OMP_NUM_THREADS=1 python benchmarks/train_step.py --threads 1
  OMP_NUM_THREADS=1 python benchmarks/train_step.py --threads 1 --shape llama
  OMP_NUM_THREADS=1 python benchmarks/train_step.py --threads 1 --shape t5
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch

from megagpt.config import Config, build_config
from megagpt.config.schema import ModelConfig
from megagpt.data.blend import build_datasets
from megagpt.data.encoder_samples import encoder_format
from megagpt.data.indexed import IndexedWriter
from megagpt.distributed.launcher import Launcher
from megagpt.distributed.process_group import TIMEOUT, init_process_group
from megagpt.engine.deepspeed_internals import init_deepspeed
from megagpt.parallel.topology import Topology
from megagpt.training.loggers.base import Logger, MetricsRecord
from megagpt.training.trainer import Trainer

WARM_UP = 2
"""First steps, which are not counted."""
GPT2 = {"activation": "gelu_tanh"}
LLAMA = {
    "norm": "rmsnorm",
    "gated_mlp": True,
    "activation": "silu",
    "position_embedding": "rotary",
    "qkv_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
}
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": ({**GPT2, "n_layer": 12, "n_embd": 256, "n_head": 8, "n_positions": 256, "vocab_size": 32000}, 8),
    "llama": (
        {
            **LLAMA,
            "n_layer": 12,
            "n_embd": 256,
            "n_head": 8,
            "n_kv_head": 4,
            "ffn_hidden": 688,
            "n_positions": 256,
            "vocab_size": 32000,
        },
        8,
    ),
    "t5": (
        {
            "encoder_layers": 6,
            "n_layer": 6,
            "n_embd": 256,
            "n_head": 8,
            "ffn_hidden": 688,
            "encoder_positions": 256,
            "n_positions": 64,
            "vocab_size": 32000,
            "norm": "rmsnorm",
            "gated_mlp": True,
            "activation": "gelu_tanh",
            "position_embedding": "relative",
            "attention_scale": 1.0,
            "tie_embeddings": False,
            "qkv_bias": False,
            "attention_bias": False,
            "mlp_bias": False,
        },
        8,
    ),
    "stories260K": (
        {
            **LLAMA,
            "n_layer": 5,
            "n_embd": 64,
            "n_head": 8,
            "n_kv_head": 4,
            "ffn_hidden": 172,
            "n_positions": 512,
            "vocab_size": 512,
        },
        8,
    ),
    "picotron": (
        {
            **LLAMA,
            "n_layer": 8,
            "n_embd": 256,
            "n_head": 8,
            "n_kv_head": 4,
            "ffn_hidden": 768,
            "n_positions": 256,
            "vocab_size": 4096,
        },
        16,
    ),
    "llama-3.2-1B": (
        {
            **LLAMA,
            "n_layer": 16,
            "n_embd": 2048,
            "n_head": 32,
            "n_kv_head": 8,
            "ffn_hidden": 8192,
            "n_positions": 2048,
            "vocab_size": 128256,
        },
        1,
    ),
}
"""Model, and sequences per step. The last one needs about 40 GB of memory for both sides."""


def main() -> None:
    """Print seconds per step of both, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2", help="model and batch")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the process")
    parser.add_argument("--compile", action="store_true", help="training.compile=true for megagpt")
    parser.add_argument("--rounds", type=int, default=8, help=f"counted steps of each, after {WARM_UP} that are not counted")
    args = parser.parse_args()
    device = torch.device("cpu")
    init_process_group(Launcher(), device)
    init_deepspeed(Launcher(), "gloo", TIMEOUT)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        config = build_run(folder, args.shape, WARM_UP + args.rounds, args.compile)
        datasets = build_datasets(config.data, config.model.n_positions, encoder_format(config.model))
        trainer = Trainer(config, Topology(), datasets, device)
        timer = trainer.logger = AlternatingTimer(trainer.logger, hugging_face_step(config))
        trainer.train()
        trainer.close()
    tokens = config.training.global_batch_size * config.model.sample_tokens
    medians = {name: statistics.median(seconds[WARM_UP:]) for name, seconds in timer.seconds.items()}
    for name, median in medians.items():
        counted = timer.seconds[name][WARM_UP:]
        spread = f"{min(counted):.3f} to {max(counted):.3f}"
        print(f"{name:13s} {median:.3f} s/step ({spread}), {tokens / median:.0f} tokens/s")
    print(f"ratio of medians: {medians['Hugging Face'] / medians['megagpt']:.2f} with {args.threads} thread(s)")


def build_run(folder: str, shape: str, steps: int, compiled: bool) -> Config:
    """Write a corpus of random tokens and return the config of a run on it."""
    model, sequences = SHAPES[shape]
    n_tokens = (steps + 2) * sequences * (model["n_positions"] + model.get("encoder_positions", 0) + 1)
    task = {"task": "span_corruption", "tokenizer": "byte"} if "encoder_layers" in model else {}
    dtype = np.dtype(np.uint16 if model["vocab_size"] <= 2**16 else np.int32)
    with IndexedWriter(f"{folder}/random", dtype) as writer:
        writer.add_documents(np.random.default_rng(0).integers(0, model["vocab_size"], n_tokens).astype(dtype), [n_tokens])
    return build_config(
        {
            "model": model,
            "data": {"train": f"{folder}/random", **task},
            "training": {
                "steps": steps,
                "micro_batch_size": sequences,
                "global_batch_size": sequences,
                "compile": compiled,
            },
            "logging": {"interval": 1, "metrics_file": f"{folder}/metrics.jsonl"},
        }
    )


class AlternatingTimer:
    """A logger that times the trainer's step, log line included, and then runs and times another step."""

    def __init__(self, logger: Logger, other_step: Callable[[], None]) -> None:
        self._logger = logger
        self._other_step = other_step
        self._start = time.perf_counter()
        self.seconds: dict[str, list[float]] = {"megagpt": [], "Hugging Face": []}

    def step(self, record: MetricsRecord) -> None:
        """Log the record, then run the other step."""
        self._logger.step(record)
        end = time.perf_counter()
        self.seconds["megagpt"].append(end - self._start)
        self._other_step()
        self._start = time.perf_counter()
        self.seconds["Hugging Face"].append(self._start - end)

    def rewind(self, step: int) -> None:
        """Pass the call on."""
        self._logger.rewind(step)

    def close(self) -> None:
        """Pass the call on."""
        self._logger.close()


def hugging_face_step(config: Config) -> Callable[[], None]:
    """Return a function that runs one training step of Hugging Face's model."""
    shape = config.model
    model = MODELS[shape.position_embedding](shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, shape.tokens_in_vocab, (config.training.global_batch_size, shape.n_positions))
    inputs = tokens
    if shape.encoder_layers:
        inputs = torch.randint(0, shape.tokens_in_vocab, (config.training.global_batch_size, shape.source_length))

    def step() -> None:
        model(inputs, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _gpt2(shape: ModelConfig) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.tokens_in_vocab,
            n_positions=shape.n_positions,
            n_embd=shape.n_embd,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _llama(shape: ModelConfig) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.tokens_in_vocab,
            max_position_embeddings=shape.n_positions,
            hidden_size=shape.n_embd,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.n_layer,
            num_attention_heads=shape.n_head,
            num_key_value_heads=shape.kv_heads,
            tie_word_embeddings=shape.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _t5(shape: ModelConfig) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=shape.tokens_in_vocab,
            d_model=shape.n_embd,
            d_kv=shape.head_size,
            d_ff=shape.ffn_hidden_size,
            num_layers=shape.encoder_layers,
            num_decoder_layers=shape.n_layer,
            num_heads=shape.n_head,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    )
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # transformers 5 ties it
    return model


MODELS = {"learned": _gpt2, "rotary": _llama, "relative": _t5}
"""model.position_embedding -> the model of transformers."""


if __name__ == "__main__":
    main()
