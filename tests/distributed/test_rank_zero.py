"""Only rank 0 prints."""

import contextlib
import io

from support.pool import Pool

from megagpt.distributed.rank_zero import rank_zero_print, rank_zero_warn


def printed() -> tuple[str, str]:
    """Return what this rank prints to standard output and to standard error."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        rank_zero_print("saved step 3")
        rank_zero_warn("the disk is almost full")
    return stdout.getvalue(), stderr.getvalue()


def test_rank_0_prints_a_line_and_a_warning_and_other_ranks_nothing(ranks: Pool) -> None:
    assert ranks.run(2, printed) == [("saved step 3\n", "warning: the disk is almost full\n"), ("", "")]
