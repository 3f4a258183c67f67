"""The id of a run in Weights & Biases, kept beside its checkpoints, so that a resumed run is the same run there."""

import re
from pathlib import Path

from megagpt.output import warn
from megagpt.regular_file import read_regular_file

RUN_ID_FILE = "wandb_run_id"
MAX_BYTES = 256


def read_run_id(folder: Path) -> str | None:
    """Return the id that is kept in a folder, or None if there is none that can be used."""
    path = folder / RUN_ID_FILE
    try:
        text = read_regular_file(path, MAX_BYTES).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        warn(f"{path}: {error.strerror}; this start is a new run in Weights & Biases")
        return None
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", text):
        warn(f"{path}: is not the id of a run; this start is a new run in Weights & Biases")
        return None
    return text


def write_run_id(folder: Path, run_id: str) -> None:
    """Keep the id in a folder. If that fails, warn that the next start will be another run."""
    path = folder / RUN_ID_FILE
    temporary = path.with_name(f"{RUN_ID_FILE}.new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(run_id + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        warn(f"{path}: cannot be written: {error.strerror}; the next start will be another run in Weights & Biases")
