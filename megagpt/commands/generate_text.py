"""tools/generate_text.py: continue a prompt with the model of a checkpoint, in one process."""

import argparse
import os
import sys
from collections.abc import Sequence

from megagpt.checkpoint.format import read_manifest, resolve_checkpoint
from megagpt.commands import shell
from megagpt.commands.progress import progress
from megagpt.config import Config
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import ConfigError
from megagpt.inference.device import select_device
from megagpt.inference.generate import generate
from megagpt.inference.load import load_model, load_run_tokenizer
from megagpt.model.gpt import DTYPES

EXAMPLE = """examples:
  python tools/generate_text.py --checkpoint runs/quickstart/checkpoints --prompt "def main(" --max-tokens 60
  python tools/generate_text.py --checkpoint runs/6B/checkpoints --prompt "The" --device cuda --dtype bf16 --top-k 50
The text goes to standard output, notes to standard error. Every token is predicted from the last model.n_positions tokens, so
the text can be longer than the model's context. It ends early at an end-of-document token. Memory is needed for the weights
in --dtype (4 bytes per parameter in fp32, 2 in bf16 and fp16), and on the host for the largest one in fp32."""
MAX_TOKENS = 10**9
MAX_SEED = 2**63 - 1


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("generate_text", __doc__, EXAMPLE)
    parser.add_argument("--checkpoint", required=True, help="folder of a checkpoint, or of a run (its newest is used)")
    parser.add_argument("--prompt", required=True, help="text to continue; an empty one starts a new document")
    parser.add_argument(
        "--max-tokens", type=int, default=100, metavar="N", help="maximum number of new tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="divides the logits; below 1 likely tokens become likelier, 0 selects the most likely one (default: %(default)s)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens (default: all)")
    parser.add_argument(
        "--seed", type=int, default=1234, metavar="N", help="seed of the sampling, equal on every device (default: %(default)s)"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="tokenizer to use instead of the checkpoint's: like data.tokenizer in a config"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N, or auto: a GPU if there is one (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="dtype of weights and activations (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-checksums", action="store_true", help="do not compare the checkpoint's files with their SHA-256"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return shell.run(_generate, create_parser(), argv)


def _generate(args: argparse.Namespace) -> None:
    _check(args)
    device = select_device(args.device)
    folder = resolve_checkpoint(args.checkpoint)
    manifest = read_manifest(folder)
    tokenizer = load_run_tokenizer(folder, manifest, args.tokenizer)
    checksums = not args.skip_checksums
    with progress("verify", manifest.total_bytes if checksums else 0) as bar:
        model, config = load_model(folder, device, args.dtype, checksums, bar)
    prompt = tokenizer.encode(args.prompt) or [tokenizer.eod_id]
    for note in _notes(config, tokenizer, len(prompt), args.max_tokens):
        print(f"note: {note}", file=sys.stderr)
    new_tokens = generate(
        model, prompt, args.max_tokens, args.temperature, args.top_k, args.seed, tokenizer.eod_id, tokenizer.vocab_size
    )
    print(_with_prompt(args.prompt, tokenizer.decode(prompt), tokenizer.decode([*prompt, *new_tokens])))


def _with_prompt(prompt: str, decoded: str, text: str) -> str:
    """Return `text` with the prompt as the user gave it: a tokenizer may lose line ends or spaces of it (`decoded`)."""
    return prompt + text.removeprefix(decoded) if text.startswith(decoded) else text


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for a value outside its range, and for a prompt that is no text."""
    if not 0 <= args.temperature < float("inf"):
        raise ConfigError(f"--temperature {args.temperature:g}: expected 0 (the most likely token) or more, for example 0.8")
    if not 1 <= args.max_tokens <= MAX_TOKENS:
        raise ConfigError(f"--max-tokens {args.max_tokens}: expected 1 to {MAX_TOKENS}")
    if args.top_k is not None and args.top_k < 1:
        raise ConfigError(f"--top-k {args.top_k}: expected 1 or more; leave it out to sample from all tokens")
    if not 0 <= args.seed <= MAX_SEED:
        raise ConfigError(f"--seed {args.seed}: expected 0 to {MAX_SEED}")
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:  # the system passes such bytes on as halves of surrogate pairs
        wrong, before = os.fsencode(args.prompt[error.start])[0], args.prompt[: error.start][-20:]
        raise ConfigError(f"--prompt: byte 0x{wrong:02x} after {before!r} is not UTF-8; expected text in UTF-8") from None


def _notes(config: Config, tokenizer: Tokenizer, prompt_length: int, max_tokens: int) -> list[str]:
    """Return what the user may not expect, one sentence each."""
    notes = []
    positions, vocab_size = config.model.n_positions, config.model.tokens_in_vocab
    if tokenizer.vocab_size < vocab_size:
        notes.append(
            f"model.vocab_size is {vocab_size}, and the tokenizer has {tokenizer.vocab_size} tokens: ids from "
            f"{tokenizer.vocab_size} on are never generated"
        )
    if prompt_length > positions:
        notes.append(f"the prompt has {prompt_length} tokens; the model sees its last {positions} (model.n_positions)")
    if prompt_length + max_tokens > positions:
        notes.append(
            f"text beyond {positions} tokens (model.n_positions) is predicted from the last {positions}, and each token takes "
            "longer"
        )
    return notes


if __name__ == "__main__":
    sys.exit(main())
