"""Configs as files, for tests that run the commands like a user."""

import json
import os
import subprocess
import sys
from pathlib import Path

from megagpt.config import to_json
from support.runs import Tree, corpus, tiny_config

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
"""The environment of a user's shell, without the variables of a launcher."""


def config_file(folder: Path, **sections: Tree) -> Path:
    """Write the config of a run of three steps on a small corpus in `folder`; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = json.loads(to_json(tiny_config(data={"train": corpus(folder)}, training={"steps": 3, "global_batch_size": 8})))
    tree["logging"] |= {"interval": 1, "metrics_file": str(folder / "metrics.jsonl")}
    for section, keys in sections.items():
        tree[section] |= keys
    path = folder / "run.json"
    path.write_text(json.dumps(tree))
    return path


def run_command(*command: object, timeout: float = 120.0, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in the repository root, with more variables in its environment; return its output as text."""
    return subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def records(folder: Path) -> list[Tree]:
    """Return the records of the metrics file of the run that `config_file` describes."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
