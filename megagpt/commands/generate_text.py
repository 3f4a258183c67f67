"""tools/generate_text.py: continue a prompt, or each prompt of a file, with a trained model."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megagpt.commands import model_options
from megagpt.commands.shell import command_parser
from megagpt.config import Config
from megagpt.data.tokenizer import Tokenizer
from megagpt.distributed.launcher import Launcher
from megagpt.errors import ConfigError
from megagpt.inference.beam_search import BeamSearch
from megagpt.inference.generate import Completion, TextGenerator
from megagpt.inference.prompts import TASKS, TaskPrompt, read_prompts
from megagpt.inference.sampling import Draw, Sampling
from megagpt.inference.source import TrainedModel
from megagpt.inference.targets import TargetWriter
from megagpt.model.kv_cache import PAGE_TOKENS, pages_for

EXAMPLE = """examples:
  python tools/generate_text.py --checkpoint runs/quickstart/checkpoints --prompt "def main(" --max-tokens 60
  python tools/generate_text.py --checkpoint runs/6B/checkpoints --prompt "The" --device cuda --dtype bf16 --top-k 50
  python tools/generate_text.py --checkpoint runs/6B/checkpoints --prompts data/prompts.txt --output texts.jsonl
  python tools/generate_text.py --checkpoint runs/quickstart_t5/checkpoints --prompt "A text to summarise." --beams 4
  torchrun --nproc-per-node 2 tools/generate_text.py --checkpoint runs/6B/checkpoints --prompt "The" --temperature 0
The text goes to standard output, notes to standard error. Every token is predicted from the last model.n_positions tokens, so
the text can be longer than the model's context. It ends early at an end-of-document token. Memory is needed for the weights
in --dtype (4 bytes per parameter in fp32, 2 in bf16 and fp16), on the host for the largest one in fp32, and for the keys and
values of all texts that are continued at a time (--batch). Several ranks share the model (tensor parallel).
A model with an encoder (T5) reads the prompt as its source and writes the most likely target, by greedy search or with --beams;
options of sampling have no effect on it. Of a source that is longer than model.encoder_positions the first tokens are used."""
MAX_TOKENS = 10**9
MAX_SEED = 2**63 - 1
MAX_BATCH = 4096
MAX_BEAMS = 1000


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser("generate_text", __doc__, EXAMPLE)
    model_options.add_arguments(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="text to continue; an empty one starts a new document")
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help='file of prompts: JSON lines with a key "prompt" or "text" (.jsonl), or one prompt a line',
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write the texts of --prompts here, as JSON lines (default: standard output)"
    )
    parser.add_argument(
        "--task", choices=TASKS, help="put examples of a task before each prompt: see examples/prompts/; sets a stop string"
    )
    parser.add_argument("--stream", action="store_true", help="print the text of --prompt while it is generated")
    parser.add_argument(
        "--max-tokens", type=int, default=100, metavar="N", help="maximum number of new tokens (default: %(default)s)"
    )
    add_sampling_arguments(parser, temperature=0.8)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; can be repeated")
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="with --prompts: also write each token's log-probability, and the N largest"
    )
    parser.add_argument(
        "--batch", type=int, default=16, metavar="N", help="prompts that are continued at a time (default: %(default)s)"
    )
    parser.add_argument("--beams", type=int, metavar="N", help="with an encoder: beam search with N beams (default: greedy)")
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="P",
        help="with --beams: log probabilities are divided by length ** P; above 0 prefers long targets (default: %(default)s)",
    )
    parser.add_argument(
        "--early-stopping", action="store_true", help="with --beams: end with as many finished targets as beams"
    )
    return parser


def add_sampling_arguments(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Add the options that say how a token is chosen. `temperature`: its default."""
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="divides the logits; below 1 likely tokens become likelier, 0 selects the most likely one (default: %(default)s)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens (default: all)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens that together have probability P (default: all)",
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="sample from tokens with at least P times the largest probability (default: all)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1: tokens that the text already has become less likely (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=1234, metavar="N", help="seed of the sampling, equal on every device (default: %(default)s)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return model_options.run(_generate, create_parser(), argv)


def _generate(args: argparse.Namespace, launcher: Launcher) -> None:
    sampling = checked_sampling(args, args.max_tokens)
    _check(args)
    texts = [args.prompt] if args.prompts is None else read_prompts(Path(args.prompts))
    task = None if args.task is None else TaskPrompt.load(args.task)
    stop = [*args.stop, *([] if task is None else [task.stop])]
    with model_options.connected(args, launcher) as ranks:
        trained = model_options.load(args, ranks)
        if trained.has_encoder:
            _write_targets(trained, texts if task is None else [task.around(text) for text in texts], args, ranks.is_first)
            return
        if args.beams is not None:
            raise ConfigError("--beams: needs a model with an encoder; leave it out to sample, or use --temperature 0")
        prompts = [trained.encode(text if task is None else task.around(text)) for text in texts]
        for note in _notes(trained, max(map(len, prompts)), args.max_tokens):
            if ranks.is_first:
                print(f"note: {note}", file=sys.stderr)
        generator = open_generator(trained, prompts, sampling, args.batch)
        added = [generator.add(prompt, sampling, stop) for prompt in prompts]
        if args.prompts is not None:
            lines = _records(generator, added, texts, args.logprobs is not None)
            _write_lines(lines, args.output if ranks.is_first else os.devnull)
        elif args.stream:
            _stream(generator, args.prompt)
        else:
            for _ in generator.run():
                pass
            print(args.prompt + added[0].text)


def _write_targets(trained: TrainedModel, texts: Sequence[str], args: argparse.Namespace, is_first: bool) -> None:
    """Print what a model with an encoder writes for each text."""
    for name in ("stream", "stop", "logprobs"):
        if getattr(args, name):
            raise ConfigError(f"--{name}: does not work with a model with an encoder; leave it out")
    writer = TargetWriter(trained, BeamSearch(args.beams or 1, args.max_tokens, args.length_penalty, args.early_stopping))
    longest, limit = max(len(trained.tokenizer.encode(text)) + 1 for text in texts), trained.config.model.source_length
    if longest > limit and is_first:
        message = f"the source has {longest} tokens; the model reads its first {limit} (model.encoder_positions)"
        print(f"note: {message}", file=sys.stderr)
    written = writer.write(texts, args.batch)
    if args.prompts is None:
        print(next(written).text)
        return
    records = (
        {
            "index": index,
            "prompt": text,
            "text": target.text,
            "finish_reason": "stop" if target.ended else "length",
            "tokens": target.n_tokens,
            "score": target.score,
        }
        for index, (text, target) in enumerate(zip(texts, written, strict=True))
    )
    _write_lines(records, args.output if is_first else os.devnull)


def open_generator(
    trained: TrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch: int,
    end: frozenset[int] = frozenset(),
) -> TextGenerator:
    """Return a generator whose cache holds `batch` of the longest texts. `end`: more ids that end a text."""
    batch = min(batch, len(prompts))
    longest = min(max(map(len, prompts)) + sampling.max_tokens, trained.config.model.n_positions)
    return trained.generator(batch * pages_for(longest) * PAGE_TOKENS, batch, end)


def _stream(generator: TextGenerator, prompt: str) -> None:
    """Print a text while it is generated."""
    print(prompt, end="", flush=True)
    for piece in generator.run():
        print(piece.text, end="", flush=True)
    print()


def _records(
    generator: TextGenerator, completions: Sequence[Completion], prompts: Sequence[str], with_logprobs: bool
) -> Iterator[dict[str, Any]]:
    """Yield a record for each prompt, in their order, as soon as it and those before it are complete."""
    written = 0
    for _ in generator.run():
        while written < len(completions) and completions[written].finish_reason is not None:
            completion = completions[written]
            record = {
                "index": written,
                "prompt": prompts[written],
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "tokens": len(completion.draws),
            }
            if with_logprobs:
                record["logprobs"] = [_logprobs(generator.tokenizer, draw) for draw in completion.draws]
            yield record
            written += 1


def _logprobs(tokenizer: Tokenizer, draw: Draw) -> dict[str, Any]:
    top = [{"token": tokenizer.decode([token]), "id": token, "logprob": logprob} for token, logprob in draw.top]
    return {"token": tokenizer.decode([draw.token]), "id": draw.token, "logprob": draw.logprob, "top": top}


def _write_lines(records: Iterator[dict[str, Any]], output: str | None) -> None:
    if output is None:
        for record in records:
            print(json.dumps(record), flush=True)
        return
    with Path(output).open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
            file.flush()


def checked_sampling(args: argparse.Namespace, max_tokens: int) -> Sampling:
    """Return how a token is chosen. Raises ConfigError for a value outside its range."""
    if not 0 <= args.temperature < float("inf"):
        raise ConfigError(f"--temperature {args.temperature:g}: expected 0 (the most likely token) or more, for example 0.8")
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise ConfigError(f"--max-tokens {max_tokens}: expected 1 to {MAX_TOKENS}")
    if args.top_k is not None and args.top_k < 1:
        raise ConfigError(f"--top-k {args.top_k}: expected 1 or more; leave it out to sample from all tokens")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top-p {args.top_p:g}: expected a probability above 0 and up to 1, for example 0.9")
    if not 0 <= args.min_p <= 1:
        raise ConfigError(f"--min-p {args.min_p:g}: expected 0 to 1, for example 0.05")
    if not 0 < args.repetition_penalty < float("inf"):
        raise ConfigError(f"--repetition-penalty {args.repetition_penalty:g}: expected a number above 0, for example 1.1")
    if not 0 <= args.seed <= MAX_SEED:
        raise ConfigError(f"--seed {args.seed}: expected 0 to {MAX_SEED}")
    return Sampling(
        max_tokens=max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        logprobs=getattr(args, "logprobs", None),
    )


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not go together or are no text."""
    if not 1 <= args.batch <= MAX_BATCH:
        raise ConfigError(f"--batch {args.batch}: expected 1 to {MAX_BATCH}")
    if args.beams is not None and not 1 <= args.beams <= MAX_BEAMS:
        raise ConfigError(f"--beams {args.beams}: expected 1 to {MAX_BEAMS}")
    if not abs(args.length_penalty) < MAX_BEAMS:
        raise ConfigError(f"--length-penalty {args.length_penalty:g}: expected a number such as 1 or 0.6")
    if args.logprobs is not None and not 0 <= args.logprobs <= 100:
        raise ConfigError(f"--logprobs {args.logprobs}: expected 0 to 100")
    for name in ("output", "logprobs"):
        if getattr(args, name) is not None and args.prompts is None:
            raise ConfigError(f"--{name}: goes with --prompts; one --prompt is printed as text")
    if args.stream and args.prompts is not None:
        raise ConfigError("--stream: goes with --prompt; the records of --prompts are written as they are complete")
    if "" in args.stop:
        raise ConfigError("--stop: expected a text, found an empty one")
    for name, text in (("--prompt", args.prompt or ""), *(("--stop", text) for text in args.stop)):
        require_text(name, text)


def require_text(name: str, text: str) -> None:
    """Raise ConfigError for an argument that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # the system passes such bytes on as halves of surrogate pairs
        wrong, before = os.fsencode(text[error.start])[0], text[: error.start][-20:]
        raise ConfigError(f"{name}: byte 0x{wrong:02x} after {before!r} is not UTF-8; expected text in UTF-8") from None


def _notes(trained: TrainedModel, prompt_length: int, max_tokens: int) -> list[str]:
    """Return what the user may not expect, one sentence each. `prompt_length`: tokens of the longest prompt."""
    notes = []
    config: Config = trained.config
    positions, vocab_size, n_tokens = config.model.n_positions, config.model.tokens_in_vocab, trained.tokenizer.vocab_size
    if n_tokens < vocab_size:
        notes.append(
            f"model.vocab_size is {vocab_size}, and the tokenizer has {n_tokens} tokens: ids from {n_tokens} on are never "
            "generated"
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
