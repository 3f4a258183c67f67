"""tools/evaluate.py: perplexity of texts, tasks of lm-evaluation-harness, and scores of written texts, with a trained model."""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megagpt.commands import model_options
from megagpt.commands.chat import add_template_argument, load_template
from megagpt.commands.model_options import Ranks
from megagpt.commands.progress import progress
from megagpt.commands.shell import command_parser
from megagpt.distributed.launcher import Launcher
from megagpt.distributed.object_collectives import all_gather_object
from megagpt.errors import ConfigError, DataError, listed
from megagpt.inference.beam_search import BeamSearch
from megagpt.inference.perplexity import Totals, documents_of, measure
from megagpt.inference.source import TrainedModel
from megagpt.inference.targets import TargetWriter
from megagpt.inference.text_scores import read_pairs, require_scorers, text_scores

EXAMPLE = """examples:
  python tools/evaluate.py --checkpoint runs/quickstart/checkpoints --data data/web.jsonl.zst --stride 16
  torchrun --nproc-per-node 4 tools/evaluate.py --checkpoint runs/6B/checkpoints --tensor 2 --data data/valid_text_document
  python tools/evaluate.py --checkpoint runs/6B/checkpoints --data data/web.jsonl.zst --output perplexity.json
With --tasks, for example --tasks hellaswag,lambada_openai, it runs tasks of EleutherAI's lm-evaluation-harness (the package
lm_eval: pip install megagpt[eval]). --include-path names a folder with tasks of your own; others are read from the Hugging
Face hub. With --pairs FILE, JSON lines with "source" and "target", a model with an encoder writes a text for each source,
which is compared with the target: ROUGE, BLEU and chrF from 0 to 100. Losses are in nats. docs/evaluation.md describes the
numbers."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser("evaluate", __doc__, EXAMPLE)
    model_options.add_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="PATH", help="prefix of a .bin/.idx pair, or a file or folder of texts: its perplexity")
    what.add_argument("--tasks", metavar="NAMES", help="tasks of lm-evaluation-harness, separated by commas")
    what.add_argument("--pairs", metavar="FILE", help="sources and targets: ROUGE, BLEU and chrF of what the model writes")
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="with --data: tokens that each window scores; fewer are slower, and lower the loss (default: half the context)",
    )
    parser.add_argument("--max-documents", type=int, metavar="N", help="with --data: only the first documents")
    parser.add_argument("--include-path", metavar="DIR", help="with --tasks: folder with more tasks, as YAML files")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="with --tasks: examples before each question")
    parser.add_argument("--limit", type=int, metavar="N", help="with --tasks: only the first questions of each task")
    parser.add_argument("--apply-chat-template", action="store_true", help="with --tasks: ask in a dialogue")
    add_template_argument(parser)
    parser.add_argument("--beams", type=int, metavar="N", help="with --pairs: beam search with N beams (default: greedy)")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="with --pairs: maximum length of a text (default: the model's context)"
    )
    parser.add_argument("--max-pairs", type=int, metavar="N", help="with --pairs: only the first pairs")
    parser.add_argument("--batch", type=int, metavar="N", help="with --pairs: sources at a time (default: 16)")
    parser.add_argument("--tensor", type=int, metavar="N", help="ranks that share one copy of the model (default: all)")
    parser.add_argument("--output", metavar="FILE", help="also write the results here, as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return model_options.run(_evaluate, create_parser(), argv)


def _evaluate(args: argparse.Namespace, launcher: Launcher) -> None:
    _check(args)
    if args.tasks is not None:
        require_harness()
    if args.pairs is not None:
        require_scorers()
    with model_options.connected(args, launcher, args.tensor) as ranks:
        trained = model_options.load(args, ranks)
        if args.tasks is not None:
            results = _tasks(args, trained, ranks)
        else:
            results = (_perplexity if args.pairs is None else _pairs)(args, trained, ranks)
        if results is not None and ranks.is_first:
            _print(results)
            if args.output is not None:
                Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _perplexity(args: argparse.Namespace, trained: TrainedModel, ranks: Ranks) -> dict[str, Any]:
    """Return the perplexities of --data; each copy of the model reads its share of the documents."""
    positions = trained.config.model.n_positions
    stride = args.stride or max(1, positions // 2)
    if stride > positions:
        raise ConfigError(f"--stride {stride}: expected 1 to {positions}, the model's context")
    topology = ranks.topology
    documents = islice(documents_of(args.data, trained.tokenizer), args.max_documents)
    own = islice(documents, topology.dp_rank, None, topology.layout.data)
    totals = measure(trained, own, stride)
    if topology.layout.world_size > 1:
        parts = all_gather_object(totals if topology.tp_rank == 0 else Totals())
        totals = Totals()
        for part in parts:
            totals.add(part)
    if not totals.tokens:
        raise DataError(f"--data {args.data}: has no text")
    return {"data": args.data, "stride": stride, **totals.report()}


def _pairs(args: argparse.Namespace, trained: TrainedModel, ranks: Ranks) -> dict[str, Any]:
    """Return the scores of what the model writes for --pairs; each copy of the model writes its share."""
    pairs, topology = read_pairs(Path(args.pairs), args.max_pairs), ranks.topology
    writer = TargetWriter(trained, BeamSearch(args.beams or 1, args.max_tokens or trained.config.model.n_positions))
    share = slice(topology.dp_rank, None, topology.layout.data)
    sources, own = [pair.source for pair in pairs[share]], {}
    with progress("sources", sum(map(len, sources))) as bar:
        for number, source, text in zip(
            range(len(pairs))[share], sources, writer.write(sources, args.batch or 16), strict=True
        ):
            own[number] = text.text
            bar.update(len(source))
    if topology.layout.world_size > 1:
        own = {number: text for part in all_gather_object(own) for number, text in part.items()}
    written = [own[number] for number in range(len(pairs))]
    return {"pairs": args.pairs, "examples": len(pairs), **text_scores(written, [pair.target for pair in pairs])}


def _tasks(args: argparse.Namespace, trained: TrainedModel, ranks: Ranks) -> dict[str, Any] | None:
    """Return the scores of --tasks; None on ranks that are not the first of their tensor group."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from megagpt.inference.harness import HarnessModel

    manager = TaskManager(include_path=args.include_path)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise ConfigError(f"--tasks {args.tasks}: no such task: {listed(unknown)}; --include-path adds a folder of tasks")
    template = load_template(trained, args.chat_template) if args.apply_chat_template else None
    results = lm_eval.simple_evaluate(
        model=HarnessModel(trained, ranks.topology, template),
        tasks=names,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        task_manager=manager,
        apply_chat_template=args.apply_chat_template,
        log_samples=False,
        bootstrap_iters=1000,
    )
    if results is None:
        return None
    return {"tasks": results["results"], "versions": results["versions"], "examples": results["n-samples"]}


def _print(results: dict[str, Any]) -> None:
    """Print the results, one number a line."""
    if "tasks" not in results:
        for name, value in results.items():
            print(f"{name:17} {value:,.4f}" if isinstance(value, float) else f"{name:17} {value}")
        return
    for task, scores in results["tasks"].items():
        for name, value in scores.items():
            metric = name.removesuffix(",none")
            error = scores.get(f"{metric}_stderr,none")
            if isinstance(value, float) and "_stderr" not in name:
                spread = f" +- {error:.4f}" if isinstance(error, float) else ""
                print(f"{task:20} {metric:17} {value:.4f}{spread}")


def require_harness() -> None:
    """Raise ConfigError if lm_eval is not installed."""
    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError(f"--tasks: needs the package lm_eval ({error}); install megagpt[eval]") from None
    del lm_eval


def _check(args: argparse.Namespace) -> None:
    for option, only_with in (
        ("stride", "data"),
        ("max_documents", "data"),
        ("include_path", "tasks"),
        ("num_fewshot", "tasks"),
        ("limit", "tasks"),
        ("beams", "pairs"),
        ("max_tokens", "pairs"),
        ("max_pairs", "pairs"),
        ("batch", "pairs"),
    ):
        value, name = getattr(args, option), option.replace("_", "-")
        if value is not None and getattr(args, only_with) is None:
            raise ConfigError(f"--{name}: goes with --{only_with}")
        if isinstance(value, int) and value < (0 if option == "num_fewshot" else 1):
            raise ConfigError(f"--{name} {value}: expected {0 if option == 'num_fewshot' else 1} or more")
    if args.tensor is not None and args.tensor < 1:
        raise ConfigError(f"--tensor {args.tensor}: expected 1 or more")
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise ConfigError(f"--include-path {args.include_path}: no such folder")


if __name__ == "__main__":
    sys.exit(main())
