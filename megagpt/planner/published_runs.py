"""Published speeds that the planner is compared with. `benchmarks/planner_accuracy.py` prints predictions beside them.

Each run is a config of ours that does the same work. Dropout is 0.1 in the papers with A100s, so their attention scores exist
in memory, as here with `attn_pdrop`. Does not import torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megagpt.config import Config, build_config
from megagpt.planner.hardware import find_hardware
from megagpt.planner.predict import Planner, Prediction
from megagpt.planner.strategy import Strategy
from megagpt.planner.timing import Efficiency

Tree = dict[str, Any]


@dataclass(frozen=True)
class PublishedRun:
    """A measured speed, and how to predict it."""

    name: str
    source: str
    gpu: str
    gpus: int
    config: Config
    unit: str
    measured: float
    """In `unit`."""
    predicted: Callable[[Prediction], float]
    """Prediction -> the value in `unit`."""
    fitted: bool = False
    """Whether the efficiency constants were fitted on this run."""
    compiled: bool = True

    def predict(self, efficiency: Efficiency | None = None) -> Prediction:
        """Return the prediction of the planner."""
        planner = Planner(self.config, find_hardware(self.gpu), efficiency)
        return planner.predict(Strategy.of(self.config, self.gpus, self.compiled))

    def error(self, efficiency: Efficiency | None = None) -> float:
        """Return the relative error of the predicted time of a step; positive: predicted too slow."""
        value = self.predicted(self.predict(efficiency))
        return value / self.measured - 1 if self.unit == "s/step" else self.measured / value - 1


def gpt_config(
    layers: int,
    hidden: int,
    heads: int,
    batch: int,
    micro_batch: int,
    *,
    length: int = 2048,
    vocab: int = 51200,
    model: Tree | None = None,
    parallel: Tree | None = None,
    recompute: str = "none",
    zero: int = 0,
    precision: str = "bf16",
    dropout: float = 0.0,
) -> Config:
    """Return the config of a GPT-3 like model, with other keys of its sections."""
    drops = {"embd_pdrop": dropout, "attn_pdrop": dropout, "resid_pdrop": dropout}
    shape = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "n_positions": length, "vocab_size": vocab}
    return build_config(
        {
            "model": {**shape, **drops, **(model or {})},
            "parallel": parallel or {},
            "zero": {"stage": zero},
            "training": {
                "steps": 1,
                "micro_batch_size": micro_batch,
                "global_batch_size": batch,
                "precision": precision,
                "recompute": recompute,
            },
        }
    )


def _schedule(pipeline: int, virtual_stages: int) -> Tree:
    name = "interleaved_1f1b" if virtual_stages > 1 else "1f1b"
    return {"pipeline": pipeline, "schedule": name, "virtual_stages": virtual_stages}


def _sc21() -> list[PublishedRun]:
    """Narayanan et al., arXiv 2104.04473, table 1. Its TFLOP/s count the recomputed forward; it splits nothing by ZeRO."""
    rows = (  # billions, hidden, heads, layers, tensor, pipeline, GPUs, batch, micro-batch, virtual stages, TFLOP/s
        (1.7, 2304, 24, 24, 1, 1, 32, 512, 16, 1, 137),
        (3.6, 3072, 32, 30, 2, 1, 64, 512, 16, 1, 138),
        (7.5, 4096, 32, 36, 4, 1, 128, 512, 16, 1, 142),
        (18.4, 6144, 48, 40, 8, 1, 256, 1024, 8, 1, 135),
        (39.1, 8192, 64, 48, 8, 2, 512, 1536, 4, 1, 138),
        (76.1, 10240, 80, 60, 8, 4, 1024, 1792, 2, 3, 140),
        (145.6, 12288, 96, 80, 8, 8, 1536, 2304, 2, 2, 148),
        (310.1, 16384, 128, 96, 8, 16, 1920, 2160, 1, 2, 155),
        (529.6, 20480, 128, 105, 8, 35, 2520, 2520, 1, 3, 163),
        (1008.0, 25600, 160, 128, 8, 64, 3072, 3072, 1, 1, 163),
    )
    runs = []
    for billions, hidden, heads, layers, tensor, pipeline, gpus, batch, micro_batch, chunks, tflops in rows:
        config = gpt_config(
            layers,
            hidden,
            heads,
            batch,
            micro_batch,
            parallel={"tensor": tensor, **_schedule(pipeline, chunks)},
            recompute="full",
            precision="fp16",
            dropout=0.1,
        )
        flops = 96 * batch * 2048 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51200 / (16 * layers * hidden))

        def value(prediction: Prediction, flops: float = flops, gpus: int = gpus) -> float:
            return flops / prediction.step_seconds / gpus / 1e12

        name = f"{billions:g}B on {gpus} A100"
        runs.append(
            PublishedRun(
                name, "SC21 table 1", "A100-80GB", gpus, config, "TFLOP/s", tflops, value, billions in (3.6, 39.1, 310.1)
            )
        )
    return runs


def _korthikanti() -> list[PublishedRun]:
    """Korthikanti et al., arXiv 2205.05198, table 5 and section 6.3."""
    rows = (  # name, hidden, heads, layers, pipeline, GPUs, batch, micro-batch, virtual stages, full, selective with SP
        ("22B", 6144, 64, 48, 1, 8, 4, 4, 1, 1.42, 1.10),
        ("175B", 12288, 96, 96, 8, 64, 64, 1, 3, 18.13, 13.75),
        ("530B", 20480, 128, 105, 35, 280, 280, 1, 3, 49.05, 37.83),
        ("1T", 25600, 160, 128, 64, 512, 512, 1, 1, 94.42, 71.49),
        ("530B", 20480, 128, 105, 35, 2240, 2240, 1, 3, None, 39.15),
    )
    runs = []
    for name, hidden, heads, layers, pipeline, gpus, batch, micro_batch, chunks, full, selective in rows:
        for recompute, seconds in (("full", full), ("selective", selective)):
            if seconds is None:
                continue
            parallel = {"tensor": 8, **_schedule(pipeline, chunks), "sequence_parallel": recompute == "selective"}
            config = gpt_config(
                layers,
                hidden,
                heads,
                batch,
                micro_batch,
                parallel=parallel,
                recompute=recompute,
                precision="fp16",
                dropout=0.1,
            )
            fitted = (name, recompute) in (("22B", "selective"), ("175B", "full"))
            what = "full recompute" if recompute == "full" else "sequence parallel, selective"
            runs.append(
                PublishedRun(
                    f"{name} on {gpus} A100, {what}",
                    "arXiv 2205.05198",
                    "A100-80GB",
                    gpus,
                    config,
                    "s/step",
                    seconds,
                    lambda prediction: prediction.step_seconds,
                    fitted,
                )
            )
    return runs


def _one_h100() -> list[PublishedRun]:
    """This project's own runs on one H100: docs/performance.md; those without compiled functions are of an earlier version."""
    rows = (  # name, layers, hidden, heads, length, batch, micro-batch, compiled, tokens/s, fitted
        ("124M", 12, 768, 12, 1024, 128, 32, True, 482_700, False),
        ("1.3B", 24, 2048, 16, 2048, 16, 4, True, 59_000, True),
        ("124M", 12, 768, 12, 1024, 128, 32, False, 284_000, False),
        ("350M", 24, 1024, 16, 1024, 64, 16, False, 129_000, False),
        ("1.3B", 24, 2048, 16, 2048, 16, 4, False, 45_800, True),
    )
    return [
        PublishedRun(
            f"{name} on one H100, {'compiled' if compiled else 'eager'}",
            "docs/performance.md",
            "H100",
            1,
            gpt_config(layers, hidden, heads, batch, micro_batch, length=length, vocab=50257),
            "tokens/s",
            speed,
            lambda prediction: prediction.tokens_per_second,
            fitted,
            compiled,
        )
        for name, layers, hidden, heads, length, batch, micro_batch, compiled, speed, fitted in rows
    ]


LLAMA: Tree = {
    "norm": "rmsnorm",
    "gated_mlp": True,
    "activation": "silu",
    "position_embedding": "rotary",
    "qkv_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_embeddings": False,
}


def _other_h100() -> list[PublishedRun]:
    """H100 runs of other programs. None was used for the fit."""
    llama_405b: Tree = {**LLAMA, "n_kv_head": 8, "ffn_hidden": 53248}
    runs = []
    for gpus, per_rank, tflops in ((8192, 32, 430), (16384, 16, 400)):
        config = gpt_config(
            126,
            16384,
            128,
            per_rank * gpus // 128,
            1,
            length=8192,
            vocab=128256,
            model=llama_405b,
            parallel={"tensor": 8, "sequence_parallel": True, **_schedule(16, 4)},
            zero=2,
        )
        runs.append(
            PublishedRun(
                f"LLaMA 3 405B on {gpus} H100",
                "arXiv 2407.21783, table 4",
                "H100",
                gpus,
                config,
                "TFLOP/s",
                tflops,
                lambda prediction: prediction.tflops_per_gpu,
            )
        )
    config = gpt_config(12, 768, 12, 512, 64, length=1024, vocab=50257, zero=1)
    runs.append(
        PublishedRun(
            "GPT-2 124M on 8 H100, llm.c",
            "modded-nanogpt, records of 2024-10-13",
            "H100",
            8,
            config,
            "tokens/s/GPU",
            468_000,
            lambda prediction: prediction.tokens_per_second / 8,
        )
    )
    return runs


def published_runs() -> list[PublishedRun]:
    """Return all runs."""
    return [*_sc21(), *_korthikanti(), *_one_h100(), *_other_h100()]
