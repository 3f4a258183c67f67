"""Cases that repeat in other combinations what the usual ones show. They run with MEGAGPT_EXHAUSTIVE=1 (`make test-all`)."""

import os
from collections.abc import Iterable

EXHAUSTIVE = os.environ.get("MEGAGPT_EXHAUSTIVE") == "1"


def chosen(cases: Iterable[str], *usual: str) -> list[str]:
    """Return the names of the cases to run: all of them, or the usual ones."""
    names = list(cases)
    unknown = set(usual) - set(names)
    assert not unknown, f"no such case: {unknown}"
    return names if EXHAUSTIVE else list(usual)
