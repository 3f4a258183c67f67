"""A run that is killed at random moments, some of them inside a save, ends as if nobody had touched it."""

from pathlib import Path

from stress.kill import stress


def test_killed_runs_end_as_undisturbed_ones(tmp_path: Path) -> None:
    outcome = stress(kills=3, ranks=2, seed=1, folder=tmp_path, steps_per_start=4)
    assert outcome.problems == []
    assert len(outcome.kills) == 3
