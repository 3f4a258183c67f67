"""tools/plan.py: predict memory, speed and cost of a run from its config, and search the best layout, without a GPU."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megagpt.commands import shell
from megagpt.config import Config, load_config, to_json
from megagpt.config.rules import broken_rules
from megagpt.errors import ConfigError
from megagpt.planner.auto_schedule import resolve_schedule
from megagpt.planner.hardware import Hardware, find_hardware
from megagpt.planner.hardware_table import GPUS, NETWORKS
from megagpt.planner.html_report import html_report
from megagpt.planner.predict import Planner, Prediction
from megagpt.planner.report import GIB, ranking_table, ranking_tree, text_report, tree
from megagpt.planner.search import SearchResult, nearest_that_fits, search
from megagpt.planner.strategy import Strategy

EXAMPLE = """examples:
  python tools/plan.py --config configs/175B.json --gpus 1024 --gpu A100-80GB
  python tools/plan.py --config configs/6B.json --gpus 64 --gpu H100 --search --write best.json
  python tools/plan.py --config configs/t5-v1.1-base.json --gpus 8 --gpu A100-80GB
  python tools/plan.py --config configs/llama-3.1-70B.json --gpus 512 --gpu H100 --network 8x400G --html plan.html
Memory is in GiB (2^30 bytes), bandwidths in GB/s (10^9 bytes) for one direction, times in seconds. docs/planner.md describes
the model and how close it is to published runs."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("plan", __doc__, EXAMPLE)
    parser.add_argument("--config", required=True, help="JSON file of the run, or the name of a shipped config, such as 175B")
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs")
    parser.add_argument("--gpu", required=True, help=f"kind of GPU: {', '.join(GPUS)}, or one of --hardware")
    parser.add_argument(
        "--network",
        help=f"network of a node: {', '.join(NETWORKS)}, or its bandwidth in GB/s; the usual one of the GPU if absent",
    )
    parser.add_argument("--hardware", type=Path, metavar="FILE", help="JSON with more GPUs, as benchmark_cluster.py writes it")
    parser.add_argument("--tokens", help="tokens of the run, such as 300B; by default those of the config")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of the config, for example parallel.tensor=4",
    )
    parser.add_argument("--search", action="store_true", help="search the fastest layout that fits")
    parser.add_argument("--write", type=Path, metavar="FILE", help="with --search: write the config with the best layout")
    parser.add_argument("--json", action="store_true", help="print JSON; in bytes, seconds and FLOPs")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with charts, one file without other files")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; 2 if the layout does not fit."""
    return shell.run(_run, create_parser(), argv)


def _run(args: argparse.Namespace) -> None:
    if args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus}: expected 1 or more")
    if args.write is not None and not args.search:
        raise ConfigError("--write: writes the layout that --search finds; add --search")
    hardware = find_hardware(args.gpu, args.network, args.hardware)
    overrides = [
        *args.set,
        *([f"training.tokens={args.tokens}", *_without_length(args.config, args.set)] if args.tokens else []),
    ]
    config = load_config(args.config, overrides)
    if config.model.vocab_size is None:
        raise ConfigError(f"{args.config}: model.vocab_size: set it, because the planner reads no tokenizer")
    planner = Planner(config, hardware)
    result = None
    if args.search:
        result = search(planner, args.gpus)
        prediction = result.ranking[0]
        config = prediction.strategy.apply(config)
    else:
        config, prediction = _predict(planner, args.gpus)
    tokens = run_tokens(config)
    problem = None if prediction.fits else _too_large(planner, prediction)
    if args.json:
        ranking = {} if result is None else {"search": {"tried": result.tried, "ranking": ranking_tree(result)}}
        print(json.dumps({**tree(config, hardware, prediction, tokens), **ranking, "problem": problem}, indent=2))
    else:
        print(text_report(config, hardware, prediction, tokens))
        if result is not None:
            print("\n" + "\n".join(ranking_table(result)))
    _write(args, config, hardware, prediction, result, tokens)
    if problem is not None:
        raise ConfigError(problem)


def _predict(planner: Planner, gpus: int) -> tuple[Config, Prediction]:
    """Predict the config's own layout; a schedule "auto" is chosen as a run chooses it."""
    config = planner.config
    strategy = Strategy.of(config, gpus)
    if config.parallel.schedule == "auto":
        config, _ = resolve_schedule(config, strategy.micro_batches, data=strategy.data, hardware=planner.hardware)
        strategy = Strategy.of(config, gpus)
    return config, planner.predict(strategy)


def _without_length(path: str, overrides: Sequence[str]) -> list[str]:
    """Return overrides that remove the other keys for the length of the run."""
    training = load_config(path, overrides).training
    return [f"training.{key}=null" for key in ("steps", "epochs") if getattr(training, key) is not None]


def run_tokens(config: Config) -> int | None:
    """Return the tokens of the run; None if epochs give its length."""
    training = config.training
    if training.steps is not None:
        return training.steps * training.global_batch_size * config.model.sample_tokens
    return training.tokens


def _too_large(planner: Planner, prediction: Prediction) -> str:
    """Return by how much a layout does not fit, and the nearest one that does."""
    excess = (prediction.peak.total - prediction.memory_limit) / GIB
    nearest = nearest_that_fits(planner, prediction.strategy)
    if nearest is None:
        hint = "no layout on these GPUs fits; use more GPUs or larger ones"
    else:
        hint = f"the nearest layout that fits: {_changed_keys(prediction.strategy, nearest.strategy)}"
    return (
        f"the layout does not fit: pipeline rank {prediction.peak_rank} needs {prediction.peak.total / GIB:.1f} GiB, "
        f"{excess:.1f} GiB more than a run can use on {planner.hardware.gpu.name}; {hint}"
    )


KEYS = {
    "tensor": "parallel.tensor",
    "pipeline": "parallel.pipeline",
    "context": "parallel.context",
    "schedule": "parallel.schedule",
    "virtual_stages": "parallel.virtual_stages",
    "sequence_parallel": "parallel.sequence_parallel",
    "zero_stage": "zero.stage",
    "micro_batch": "training.micro_batch_size",
    "recompute": "training.recompute",
    "recompute_layers": "training.recompute_layers",
}
"""Field of a strategy -> key of the config."""


def _changed_keys(old: Strategy, new: Strategy) -> str:
    """Return the overrides that lead from one strategy to another."""
    changed = [
        f"{key}={json.dumps(getattr(new, name))}" for name, key in KEYS.items() if getattr(old, name) != getattr(new, name)
    ]
    return "--set " + " ".join(text.replace('"', "") for text in changed)


def _write(
    args: argparse.Namespace,
    config: Config,
    hardware: Hardware,
    prediction: Prediction,
    result: SearchResult | None,
    tokens: int | None,
) -> None:
    if args.html is not None:
        title = f"{Path(args.config).name.removesuffix('.json')} on {args.gpus:,} {hardware.gpu.name}"
        args.html.write_text(html_report(title, config, hardware, prediction, tokens, result), encoding="utf-8")
        print(f"{args.html}: written", file=sys.stderr)
    if args.write is not None:
        assert not broken_rules(config)
        text = json.dumps(json.loads(to_json(config)), indent=2)
        args.write.write_text(
            f"// Layout for {args.gpus} {hardware.gpu.name}, by tools/plan.py --search.\n{text}\n", encoding="utf-8"
        )
        print(f"{args.write}: written", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
