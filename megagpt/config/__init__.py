"""One JSON file, one typed tree: `load_config` reads it; the resulting `Config` never changes."""

from megagpt.config.load import build_config, config_hash, load_config, to_json, with_vocab_size
from megagpt.config.renamed import upgrade_keys
from megagpt.config.rules import data_parallel_size
from megagpt.config.schema import Config

__all__ = [
    "Config",
    "build_config",
    "config_hash",
    "data_parallel_size",
    "load_config",
    "to_json",
    "upgrade_keys",
    "with_vocab_size",
]
