"""Prompts: from files, and with examples of a task before them."""

import json
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import ConfigError, DataError
from megagpt.regular_file import read_regular_file

TASKS = ("translate", "summarise", "question-answer", "verse")
"""Names of the files in examples/prompts."""
PLACE = "{text}"
"""Where the user's text goes in such a file."""
MAX_PROMPT_BYTES = 2**30
_FOLDERS = (Path(__file__).parents[2] / "examples" / "prompts", Path(__file__).parents[1] / "prompts")
"""Where the files are in a clone, and in an installed package."""


@dataclass(frozen=True)
class TaskPrompt:
    """Examples of a task, after which a model without fine-tuning does the task for one more text."""

    template: str
    stop: str = "\n\n"
    """A blank line ends each example, so also the answer."""

    @classmethod
    def load(cls, task: str) -> "TaskPrompt":
        """Return the examples of a task. Raises ConfigError if its file is missing or has no place for the text."""
        for folder in _FOLDERS:
            path = folder / f"{task}.txt"
            if path.is_file():
                template = path.read_text(encoding="utf-8")
                if PLACE not in template:
                    raise ConfigError(f"{path}: has no {PLACE}, the place of the prompt")
                return cls(template)
        raise ConfigError(f"--task {task}: {_FOLDERS[0] / f'{task}.txt'}: no such file")

    def around(self, text: str) -> str:
        """Return the prompt for one text. Blank lines in it would end it early, so they are removed."""
        lines = [line for line in text.splitlines() if line.strip()]
        return self.template.replace(PLACE, "\n".join(lines))


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: JSON lines (.jsonl) with a key "prompt" or "text", or one prompt a line.

    Raises DataError for a file that cannot be read or has no prompts, and for a line that is no such object.
    """
    try:
        lines = read_regular_file(path, MAX_PROMPT_BYTES).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; expected text in UTF-8") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}; expected a file of prompts") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path}: has no prompts; expected JSON lines or one prompt a line")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt_of(line, f"{path}: line {number}") for number, line in numbered]


def _prompt_of(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}") from None
    if isinstance(record, dict):
        for key in ("prompt", "text"):
            if isinstance(record.get(key), str):
                return str(record[key])
    raise DataError(f'{place}: expected an object with a text under "prompt", such as {{"prompt": "Once upon"}}')
