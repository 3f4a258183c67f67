"""Compare the planner's predictions with published speeds: a Markdown table, as in docs/planner.md.

`python benchmarks/planner_accuracy.py` takes a few seconds and needs no GPU.
"""

import statistics

from megagpt.planner.published_runs import published_runs


def main() -> None:
    """Print the table."""
    print("| run | measured | predicted | error of the time | source |\n| --- | --- | --- | --- | --- |")
    errors = []
    for run in published_runs():
        prediction, error = run.predict(), run.error()
        errors.append(abs(error))
        name = f"{run.name} (fitted)" if run.fitted else run.name
        value = run.predicted(prediction)
        print(f"| {name} | {run.measured:,g} {run.unit} | {_rounded(value)} | {error:+.1%} | {run.source} |")
    print(f"\nMedian error {statistics.median(errors):.1%}, largest {max(errors):.1%}, {len(errors)} runs.")


def _rounded(value: float) -> str:
    return f"{round(value, -2):,.0f}" if value >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    main()
