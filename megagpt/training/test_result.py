"""The result of the evaluation on the test data, kept with the checkpoints, so that a finished run does not repeat it."""

import json
from pathlib import Path
from typing import Any

from megagpt.config.schema import Config
from megagpt.distributed.object_collectives import broadcast_object
from megagpt.distributed.rank_zero import rank_zero_warn
from megagpt.regular_file import read_regular_file

TEST_RESULT = "test_result.json"
MAX_BYTES = 2**20


class TestResult:
    """The file in checkpoint.dir with the last step, the test data and its loss; nothing without checkpoint.dir."""

    __test__ = False  # not a test of pytest

    def __init__(self, config: Config) -> None:
        self._path = Path(config.checkpoint.dir) / TEST_RESULT if config.checkpoint.dir is not None else None
        data = config.data
        self._source = {
            "test": data.test,
            "paths": data.paths,
            "split": data.split,
            "samples": config.evaluation.test_samples,
        }

    def exists(self, step: int, total_steps: int) -> bool:
        """Return whether a run that is at its last step has been evaluated on the same test data before. Collective."""
        return broadcast_object(step == total_steps and self._read() == {"step": step, **self._source})

    def write(self, step: int, losses: dict[str, Any]) -> None:
        """Write the result. Call it on rank 0. If it cannot be written, only warn: the loss has been logged."""
        if self._path is None:
            return
        temporary = self._path.with_name(f"{TEST_RESULT}.new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"step": step, **self._source, **losses}) + "\n", encoding="utf-8")
            temporary.replace(self._path)
        except OSError as error:
            rank_zero_warn(f"{self._path}: cannot be written: {error.strerror}; the next start evaluates the test data again")

    def _read(self) -> dict[str, Any] | None:
        """Return step and source of the file; None if there is no file with them."""
        if self._path is None:
            return None
        try:
            content = json.loads(read_regular_file(self._path, MAX_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        return {name: content.get(name) for name in ("step", *self._source)} if isinstance(content, dict) else None
