"""tools/serve.py: answer HTTP requests with a trained model, with the interface of OpenAI's."""

import argparse
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from megagpt.commands import model_options
from megagpt.commands.chat import add_template_argument, load_template
from megagpt.commands.shell import command_parser
from megagpt.data.chat_template import ChatTemplate
from megagpt.distributed.launcher import Launcher
from megagpt.distributed.object_collectives import broadcast_object
from megagpt.errors import ConfigError, DataError
from megagpt.inference.dialogue import split_end
from megagpt.inference.generate import TextGenerator
from megagpt.inference.source import TrainedModel
from megagpt.output import note

EXAMPLE = """examples:
  python tools/serve.py --checkpoint runs/quickstart/checkpoints --port 8000
  MEGAGPT_API_KEY=secret python tools/serve.py --checkpoint runs/6B/checkpoints --host 0.0.0.0 --device cuda --dtype bf16
Then open http://127.0.0.1:8000, or use a client of OpenAI's interface with base_url http://127.0.0.1:8000/v1. Without a key
(MEGAGPT_API_KEY or --api-key-file) only this machine is served. Several ranks share the model (tensor parallel), for example
by torchrun --nproc-per-node 2. docs/serving.md has the fields, limits and metrics. For production, export the model
(tools/convert_checkpoint.py to-hf) and serve it with vLLM."""
API_KEY = "MEGAGPT_API_KEY"
SHORTEST_KEY = 6


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser("serve", __doc__, EXAMPLE)
    model_options.add_arguments(parser)
    add_template_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="TCP port; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--name", help="name of the model for clients (default: the folder's name)")
    parser.add_argument("--api-key-file", metavar="FILE", help=f"file with the key that clients send; or set {API_KEY}")
    parser.add_argument(
        "--batch", type=int, default=32, metavar="N", help="texts that are continued at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="tokens whose keys and values are kept (default: --batch texts of the full context)",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="texts that may wait; more get status 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--max-output-tokens", type=int, metavar="N", help="largest max_tokens of a request (default: the model's context)"
    )
    parser.add_argument(
        "--max-request-bytes", type=int, default=2**20, metavar="N", help="largest request (default: %(default)s bytes)"
    )
    parser.add_argument("--access-log", action="store_true", help="print a line for each request")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return model_options.run(_serve, create_parser(), argv)


def _serve(args: argparse.Namespace, launcher: Launcher) -> None:
    require_packages()
    _check(args)
    key = api_key(args)
    require_key(args.host, key)
    listener = open_listener(args.host, args.port) if launcher.rank == 0 else None
    with model_options.connected(args, launcher) as ranks:
        trained = model_options.load(args, ranks)
        template = _template(trained, args.chat_template)
        positions = trained.config.model.n_positions
        end = frozenset() if template is None else split_end(template)[0]
        generator = trained.generator(args.cache_tokens or args.batch * positions, args.batch, end)
        if listener is None:
            _follow(generator)
        else:
            _listen(args, trained, template, generator, listener, key, launcher.world_size > 1)


def _listen(
    args: argparse.Namespace,
    trained: TrainedModel,
    template: ChatTemplate | None,
    generator: TextGenerator,
    listener: socket.socket,
    key: str | None,
    has_followers: bool,
) -> None:
    """Answer requests until SIGINT or SIGTERM."""
    import uvicorn

    from megagpt.serving.app import Service, create_app
    from megagpt.serving.metrics import Metrics
    from megagpt.serving.requests import Limits
    from megagpt.serving.worker import EngineWorker

    positions = trained.config.model.n_positions
    limits = Limits(positions, min(args.max_output_tokens or positions, positions), max_texts=args.batch)
    worker = EngineWorker(generator, Metrics(), args.max_queue, broadcast_object if has_followers else lambda commands: None)
    name = args.name or model_name(args.checkpoint)
    app = create_app(Service(trained, template, worker, limits, name, args.max_request_bytes, key))
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    note(f"{name}: {positions} tokens of context, {args.batch} texts at a time; http://{shown}:{port}")
    config = uvicorn.Config(app, log_level="warning", access_log=args.access_log, lifespan="on", timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])


def _follow(generator: TextGenerator) -> None:
    """Compute this rank's part of every step of the first rank's engine."""
    from megagpt.serving.worker import EngineLoop

    EngineLoop(generator, lambda wait: broadcast_object(None)).run()


def _template(trained: TrainedModel, template: str | None) -> ChatTemplate | None:
    """Return the chat template; None, with a note, if the tokenizer has none and none is asked for."""
    try:
        return load_template(trained, template)
    except DataError as error:
        if template is not None:
            raise
        note(f"note: /v1/chat/completions is not available: {error}; --chat-template names one")
        return None


def require_packages() -> None:
    """Raise ConfigError if a package is missing that only the server needs."""
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"serve needs the package {error.name}; install megagpt[serve]") from None
    del fastapi, prometheus_client, uvicorn


def api_key(args: argparse.Namespace) -> str | None:
    """Return the key that clients must send. Raises ConfigError for one that is too short or cannot be read."""
    source, key = API_KEY, os.environ.get(API_KEY)
    if args.api_key_file is not None:
        source = f"--api-key-file {args.api_key_file}"
        try:
            key = Path(args.api_key_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    if key is None:
        return None
    key = key.strip()
    if len(key) < SHORTEST_KEY or not key.isprintable():
        raise ConfigError(f"{source}: expected a key of {SHORTEST_KEY} or more characters in one line")
    return key


def require_key(host: str, key: str | None) -> None:
    """Raise ConfigError for an address that other machines reach, if there is no key."""
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local and key is None:
        raise ConfigError(
            f"--host {host}: other machines could use the model without a key; set {API_KEY} or --api-key-file, or use "
            "--host 127.0.0.1"
        )


def open_listener(host: str, port: int) -> socket.socket:
    """Return a socket that is bound. Raises ConfigError if the address or the port cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(512)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"--host {host} --port {port}: {reason}; choose another port, or 0 for a free one") from None
    return listener


def model_name(checkpoint: str) -> str:
    """Return a name for the model at a path: the folder's, or the run's for the usual name of its checkpoints."""
    path = Path(checkpoint).resolve()
    while path.name == "checkpoints" or path.name.startswith("step_"):
        path = path.parent
    return path.name or "megagpt"


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port}: expected 1 to 65535, or 0 for a free one")
    for name, least, most in (
        ("batch", 1, 4096),
        ("cache_tokens", 1, 10**12),
        ("max_queue", 0, 10**6),
        ("max_output_tokens", 1, 10**9),
        ("max_request_bytes", 1000, 2**30),
    ):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected {least} to {most}")


if __name__ == "__main__":
    sys.exit(main())
