"""A trained model with what its texts need: a checkpoint of any layout, or a folder of a Hugging Face model."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megagpt.checkpoint.format import IMPORTED_FROM, Manifest, read_manifest, resolve_checkpoint
from megagpt.checkpoint.tokenizer_files import carried_path
from megagpt.config import Config
from megagpt.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megagpt.errors import ConfigError, DataError
from megagpt.hugging_face.folder import CONFIG, GENERATION, MAX_CONFIG_BYTES, read_object
from megagpt.inference.device import require_memory
from megagpt.inference.engine import GenerationEngine, cache_bytes
from megagpt.inference.generate import TextGenerator
from megagpt.inference.load import load_hugging_face, load_model, load_run_tokenizer
from megagpt.model.chunk import Chunk
from megagpt.model.encoder_decoder import EncoderDecoderChunk
from megagpt.model.gpt import GPTChunk
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.progress import Progress


@dataclass(frozen=True)
class TrainedModel:
    """A model in memory, ready to continue texts."""

    chunk: Chunk
    """All layers."""
    config: Config
    tokenizer: Tokenizer
    end: frozenset[int]
    """Ids that end a text: the end of a document, and those that a Hugging Face model declares."""
    before: tuple[int, ...]
    """Ids that a Hugging Face tokenizer adds before a text, such as a BOS token; megagpt's own training adds none."""
    tokenizer_path: str
    """Where the tokenizer's files are, which may have a chat template; or "byte"."""

    @property
    def has_encoder(self) -> bool:
        """Whether the model writes a target for a source, instead of continuing a text."""
        return isinstance(self.chunk, EncoderDecoderChunk)

    @property
    def model(self) -> GPTChunk:
        """The model, which continues texts. Raises ConfigError for a model with an encoder."""
        if not isinstance(self.chunk, GPTChunk):
            raise ConfigError(
                f"the model has an encoder (model.encoder_layers {self.config.model.encoder_layers}), so it continues no text; "
                "tools/generate_text.py writes targets for sources"
            )
        return self.chunk

    @property
    def encoder_decoder(self) -> EncoderDecoderChunk:
        """The model, which writes targets. Raises ConfigError for a model without an encoder."""
        if not isinstance(self.chunk, EncoderDecoderChunk):
            raise ConfigError(
                "the model has no encoder (model.encoder_layers 0); expected one that writes a target for a source"
            )
        return self.chunk

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt; an empty one starts a new document."""
        ids = [*self.before, *self.tokenizer.encode(text)]
        return ids or [self.tokenizer.eod_id]

    def generator(self, cache_tokens: int, max_rows: int, end: frozenset[int] = frozenset()) -> TextGenerator:
        """Return a generator of texts.

        `cache_tokens`: tokens whose keys and values fit in its memory; `max_rows`: texts that are continued at a time; `end`:
        more ids that end a text. Raises ConfigError if the memory does not suffice.
        """
        size = cache_bytes(self.model, cache_tokens)
        device = next(self.model.parameters()).device
        require_memory(f"keys and values of {cache_tokens:,} tokens", size, device, "use fewer or shorter texts at a time")
        engine = GenerationEngine(self.model, self.end | end, self.tokenizer.vocab_size, cache_tokens, max_rows)
        return TextGenerator(engine, self.tokenizer)


class CheckpointSource:
    """A checkpoint of megagpt."""

    def __init__(self, folder: Path, tokenizer: str | None) -> None:
        """`tokenizer`: path of another tokenizer than the checkpoint's. Raises CheckpointError, ConfigError or DataError."""
        self.folder = folder
        self._manifest: Manifest = read_manifest(folder)
        self._tokenizer = load_run_tokenizer(folder, self._manifest, tokenizer)
        named = self._manifest.config.get("data", {}).get("tokenizer")
        self._tokenizer_path = str(tokenizer or carried_path(folder, self._manifest) or named)

    def total_bytes(self, checksums: bool) -> int:
        """Return how many bytes `load` reports as progress."""
        return self._manifest.total_bytes if checksums else 0

    def load(
        self, device: torch.device, dtype: str, checksums: bool, progress: Progress, parallel: ParallelContext
    ) -> TrainedModel:
        """Load this rank's part of the model; see `load_model`."""
        model, config = load_model(self.folder, device, dtype, checksums, progress, parallel)
        end = _end_ids(self._tokenizer, _folder(self._tokenizer_path))
        before = _added_before(self._tokenizer) if IMPORTED_FROM in self._manifest.state else ()
        return TrainedModel(model, config, self._tokenizer, end, before, self._tokenizer_path)


class HuggingFaceSource:
    """A folder of a Hugging Face model."""

    def __init__(self, folder: Path, tokenizer: str | None) -> None:
        """`tokenizer`: path of another tokenizer than the folder's. Raises DataError if there is none."""
        self.folder = folder
        self._path = tokenizer or str(folder)
        try:
            self._tokenizer = load_tokenizer(self._path)
        except DataError as error:
            raise DataError(f"{error}; give --tokenizer" if tokenizer is None else str(error)) from None

    def total_bytes(self, checksums: bool) -> int:
        """Return how many bytes `load` reports as progress; 0 for not known."""
        return 0

    def load(
        self, device: torch.device, dtype: str, checksums: bool, progress: Progress, parallel: ParallelContext
    ) -> TrainedModel:
        """Load this rank's part of the model; see `load_hugging_face`. There are no checksums."""
        model, config = load_hugging_face(self.folder, device, dtype, progress, parallel)
        end = _end_ids(self._tokenizer, self.folder)
        return TrainedModel(model, config, self._tokenizer, end, _added_before(self._tokenizer), self._path)


def open_source(path: str, tokenizer: str | None = None) -> CheckpointSource | HuggingFaceSource:
    """Return the model at `path`: a checkpoint, a run (its newest checkpoint), or a folder of a Hugging Face model.

    Raises CheckpointError if there is none, and DataError or ConfigError if its tokenizer cannot be loaded.
    """
    if (Path(path) / CONFIG).is_file():
        return HuggingFaceSource(Path(path), tokenizer)
    return CheckpointSource(resolve_checkpoint(path), tokenizer)


def _end_ids(tokenizer: Tokenizer, folder: Path | None) -> frozenset[int]:
    """Return the ids that end a text: the tokenizer's, and those of generation_config.json or config.json in `folder`."""
    files = [] if folder is None else [path for name in (GENERATION, CONFIG) if (path := folder / name).is_file()]
    declared = read_object(files[0], MAX_CONFIG_BYTES).get("eos_token_id") if files else None
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset([tokenizer.eod_id, *(token for token in ids if isinstance(token, int))])


def _added_before(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.framing()[0]) if isinstance(tokenizer, HuggingFaceTokenizer) else ()


def _folder(path: str) -> Path | None:
    if path == "byte":
        return None
    return Path(path) if Path(path).is_dir() else Path(path).parent
