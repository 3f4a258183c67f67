"""tools/generate_text.py: continue a prompt with the model of a checkpoint, in one process."""

import argparse
import sys
from collections.abc import Sequence

from megagpt.checkpoint.format import resolve_checkpoint
from megagpt.commands import shell
from megagpt.data.tokenizer import load_tokenizer
from megagpt.errors import ConfigError
from megagpt.inference.generate import generate, load_model

EXAMPLE = """example:
  python tools/generate_text.py --checkpoint runs/quickstart/checkpoints --prompt "def main(" --max-tokens 60"""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("generate_text", __doc__, EXAMPLE)
    parser.add_argument("--checkpoint", required=True, help="folder of a checkpoint, or of a run (its newest is used)")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=100, help="maximum number of new tokens (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 selects the most likely token (%(default)s)")
    parser.add_argument("--top-k", type=int, help="sample from the k most likely tokens (all)")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the sampling (%(default)s)")
    parser.add_argument("--tokenizer", help="tokenizer path (the data.tokenizer that the model was trained with)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return shell.run(_generate, create_parser(), argv)


def _generate(args: argparse.Namespace) -> None:
    if args.temperature < 0 or args.max_tokens < 1 or (args.top_k is not None and args.top_k < 1):
        raise ConfigError("--temperature must be 0 or more, --max-tokens and --top-k must be 1 or more")
    model, config = load_model(resolve_checkpoint(args.checkpoint))
    path = args.tokenizer or config.data.tokenizer
    if path is None:
        raise ConfigError("--tokenizer: the checkpoint's config names no tokenizer; give the one that its data was made with")
    tokenizer = load_tokenizer(path)
    prompt = tokenizer.encode_batch([args.prompt])[0]
    new_tokens = generate(model, prompt, args.max_tokens, args.temperature, args.top_k, args.seed, tokenizer.eod_id)
    print(tokenizer.decode([*prompt, *new_tokens]))


if __name__ == "__main__":
    sys.exit(main())
