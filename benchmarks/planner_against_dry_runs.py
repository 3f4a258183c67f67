"""Compare the planner's closed formulas with dry runs of every pipeline stage of every shipped config at full size.

`python benchmarks/planner_against_dry_runs.py [NAME ...]` takes two minutes for all configs and needs no GPU. Its exit code is
1 if a number differs.
"""

import sys

from megagpt.config import load_config
from megagpt.config.find import shipped_configs
from megagpt.parallel.topology import Layout
from megagpt.planner.dry_run import open_dry_run
from megagpt.planner.stages import StageModel
from megagpt.planner.strategy import Strategy


def main(names: list[str]) -> int:
    """Compare the named configs, or all; return the exit code."""
    n_wrong = 0
    for name in names or sorted(shipped_configs()):
        config = load_config(name)
        if config.model.vocab_size is None:
            config = load_config(name, ["model.vocab_size=1024"])
        # The dry run's tensors are on the CPU, where a trained bias keeps scores in memory, as code without compilation does.
        compiled = False if config.model.encoder_layers and config.training.recompute == "none" else None
        gpus = 2 * config.parallel.tensor * config.parallel.pipeline * config.parallel.context
        strategy = Strategy.of(config, gpus, compiled)
        layout = Layout(strategy.tensor, strategy.pipeline, strategy.context, strategy.data)
        stages, wrong = StageModel(config).stages(strategy), 0
        for rank in layout.ranks_along(0, "pipeline"):
            with open_dry_run(config, layout, rank, strategy.compiled) as dry_run:
                for number, chunk in dry_run.chunks.items():
                    stage = stages[number]
                    parameters = sum(parameter.numel() for parameter in chunk.parameters())
                    saved = dry_run.saved_bytes(number) + stage.held_beside
                    if (stage.parameters, stage.saved) != (parameters, saved):
                        wrong += 1
                        print(f"{name} stage {number}: {stage.parameters} {stage.saved}, counted {parameters} {saved}")
        print(f"{name}: {len(stages)} stages, {wrong} differ", flush=True)
        n_wrong += wrong
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
