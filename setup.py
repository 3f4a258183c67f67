"""The package: ranges that should work; `requirements.txt` has the exact versions that were tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """`megagpt.__version__`, read without importing the package."""
    text = (HERE / "megagpt" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found, "megagpt/__init__.py has no __version__"
    return found[1]


def console_script(name: str) -> str:
    """`megagpt-plot-losses = megagpt.commands.plot_losses:main` for `plot-losses`."""
    return f"megagpt-{name} = megagpt.commands.{name.replace('-', '_')}:main"


COMMANDS = (
    "pretrain",
    "pretrain-t5",
    "preprocess-data",
    "merge-datasets",
    "inspect-dataset",
    "inspect-checkpoint",
    "export-weights",
    "convert-checkpoint",
    "convert-config",
    "train-tokenizer",
    "generate-text",
    "chat",
    "serve",
    "evaluate",
    "plot-losses",
    "draw-schedule",
    "plan",
    "benchmark-cluster",
    "find-learning-rate",
    "finetune-classifier",
    "get-gpt2-tokenizer",
)

setup(
    name="megagpt",
    version=version(),
    description="A GPT pretrainer: tensor x pipeline x data parallel over DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["megagpt", "megagpt.*"]), "megagpt.configs", "megagpt.prompts"],
    # So that `--config 125M` and `--task translate` work in an installed package.
    package_dir={"megagpt.configs": "configs", "megagpt.prompts": "examples/prompts"},
    package_data={"megagpt.configs": ["*.json"], "megagpt.prompts": ["*.txt"], "megagpt.serving": ["*.html"]},
    install_requires=[
        "torch>=2.10",  # the first with Tensor.grad_dtype
        "deepspeed>=0.19,<0.20",  # megagpt uses private parts: engine/deepspeed_internals.py
        "numpy>=1.26",
        "pydantic>=2.7",  # the first with use_attribute_docstrings
        "jinja2>=3.1.6",  # older versions have known escapes from the sandbox
        "json5>=0.9.20",
        "pyyaml>=6",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "gigatoken>=0.10",
        "pyarrow>=15",
        "safetensors>=0.4",
        "tqdm>=4.60",
        "matplotlib>=3.8",
        "wandb>=0.18",
    ],
    extras_require={
        "tensorboard": ["tensorboard>=2.16"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20"],
        "eval": ["lm_eval>=0.4.9", "rouge-score>=0.1.2", "sacrebleu>=2.3"],
        "dev": ["pytest>=8", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.10", "transformers>=4.50"],
    },
    entry_points={"console_scripts": ["megagpt = megagpt.__main__:main", *map(console_script, COMMANDS)]},
)
