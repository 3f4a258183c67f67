"""tools/chat.py: talk to a trained model in the terminal."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from megagpt.commands import model_options
from megagpt.commands.generate_text import add_sampling_arguments, checked_sampling, open_generator, require_text
from megagpt.commands.shell import command_parser
from megagpt.data.chat_template import ChatTemplate
from megagpt.distributed.launcher import Launcher
from megagpt.errors import ConfigError
from megagpt.inference.dialogue import Dialogue, split_end
from megagpt.inference.generate import TextGenerator
from megagpt.inference.sampling import Sampling
from megagpt.inference.source import TrainedModel

EXAMPLE = """examples:
  python tools/chat.py --checkpoint runs/tuned/checkpoints
  python tools/chat.py --checkpoint runs/quickstart/checkpoints --chat-template chatml --system "Answer in one line."
Each line is a message. /clear forgets the dialogue, /exit (or Ctrl-D) ends. When the dialogue is longer than the model's
context (model.n_positions tokens), the oldest turns are left out, and a note says so."""
CLEAR, EXIT = "/clear", "/exit"


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser("chat", __doc__, EXAMPLE)
    model_options.add_arguments(parser)
    add_template_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="instructions at the start of the dialogue")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="maximum number of tokens of an answer (default: a quarter of the context)"
    )
    add_sampling_arguments(parser, temperature=0.7)
    return parser


def add_template_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option that names a chat template."""
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="chatml, or a file with a Jinja template, instead of the tokenizer's own template",
    )


def load_template(trained: TrainedModel, template: str | None) -> ChatTemplate:
    """Return the chat template of a model's tokenizer. Raises DataError if there is none."""
    return ChatTemplate.load(trained.tokenizer_path, template)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return model_options.run(_chat, create_parser(), argv)


def _chat(args: argparse.Namespace, launcher: Launcher) -> None:
    if launcher.world_size > 1:
        raise ConfigError("chat runs in one process; tools/generate_text.py and tools/serve.py run on several ranks")
    sampling = checked_sampling(args, 1 if args.max_tokens is None else args.max_tokens)
    require_text("--system", args.system or "")
    with model_options.connected(args, launcher) as ranks:
        trained = model_options.load(args, ranks)
        template = load_template(trained, args.chat_template)
        positions = trained.config.model.n_positions
        max_tokens = args.max_tokens or max(1, positions // 4)
        if max_tokens >= positions:
            raise ConfigError(f"--max-tokens {max_tokens}: expected below {positions}, the model's context, to leave room")
        dialogue = Dialogue(template, positions, max_tokens, args.system)
        _run(trained, dialogue, sampling)


def _run(trained: TrainedModel, dialogue: Dialogue, sampling: Sampling) -> None:
    """Read messages and print answers until the input ends."""
    end, stop = split_end(dialogue.template)
    # Room for every dialogue: the cache of one text of the full context.
    longest = [[0] * dialogue.positions]
    generator = open_generator(trained, longest, sampling, batch=1, end=end)
    turn = 0
    while (line := _read_line()) is not None:
        if line == CLEAR:
            dialogue.clear()
            continue
        dialogue.add("user", line)
        turn += 1
        _answer(generator, dialogue, replace(sampling, seed=sampling.seed + turn), stop)


def _read_line() -> str | None:
    """Return the next message, or None at the end. Empty lines are left out."""
    prompt = "you: " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return None
        except UnicodeDecodeError:
            print("note: the line is not UTF-8 text", file=sys.stderr)
            continue
        if line == EXIT:
            return None
        if line:
            return line


def _answer(generator: TextGenerator, dialogue: Dialogue, sampling: Sampling, stop: Sequence[str]) -> None:
    """Print the model's answer to the last message while it is generated. Ctrl-C ends the answer."""
    try:
        prompt = dialogue.prompt()
    except ConfigError as error:
        dialogue.remove_last()
        print(f"note: {error}", file=sys.stderr)
        return
    if prompt.n_dropped:
        print(
            f"note: the oldest {prompt.n_dropped} messages are left out: the context has {dialogue.positions} tokens",
            file=sys.stderr,
        )
    completion = generator.add(prompt.ids, replace(sampling, max_tokens=dialogue.max_tokens), stop)
    try:
        for piece in generator.run():
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        generator.cancel(completion)
    print(flush=True)
    dialogue.add("assistant", completion.text)


if __name__ == "__main__":
    sys.exit(main())
