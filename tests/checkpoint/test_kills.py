"""A run that is killed at random moments, some of them during a save, ends like a run that was never killed."""

from pathlib import Path

from stress.kill import stress


def test_a_killed_and_restarted_run_ends_with_the_same_bits_as_an_undisturbed_one(tmp_path: Path) -> None:
    outcome = stress(kills=3, ranks=2, seed=1, folder=tmp_path, steps_per_start=4)
    assert outcome.problems == []
    assert len(outcome.kills) == 3
