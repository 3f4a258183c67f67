"""Cases that repeat in other combinations what the usual ones show. They run with MEGAGPT_EXHAUSTIVE=1 (`make test-all`)."""

import os
from collections.abc import Iterable
from typing import Any

EXHAUSTIVE = os.environ.get("MEGAGPT_EXHAUSTIVE") == "1"


def more(*cases: Any) -> tuple[Any, ...]:
    """Return the cases in the exhaustive suite, else none."""
    return cases if EXHAUSTIVE else ()


def chosen(cases: Iterable[str], *usual: str) -> list[str]:
    """Return the names of the cases to run: all of them, or the usual ones."""
    names = list(cases)
    unknown = set(usual) - set(names)
    assert not unknown, f"no such case: {unknown}"
    return names if EXHAUSTIVE else list(usual)
