"""A service with a tiny model, for tests of the server."""

from pathlib import Path

from megagpt.data.chat_template import ChatTemplate
from megagpt.inference.source import TrainedModel
from megagpt.serving.app import Service
from megagpt.serving.metrics import Metrics
from megagpt.serving.requests import Limits
from megagpt.serving.worker import EngineWorker
from support.trained import load_trained, write_random

POSITIONS = 128


def byte_model(folder: Path) -> TrainedModel:
    """Return a model with random weights whose tokens are bytes."""
    return load_trained(write_random(folder, "byte", 257, POSITIONS))


def service_of(trained: TrainedModel, rows: int = 4, max_waiting: int = 4, api_key: str | None = None) -> Service:
    """Return a service that has not started."""
    worker = EngineWorker(trained.generator(rows * POSITIONS, rows), Metrics(), max_waiting)
    template = ChatTemplate.load("byte", "chatml")
    return Service(trained, template, worker, Limits(POSITIONS, 100, 4), "tiny", 10_000, api_key)
