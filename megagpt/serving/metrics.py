"""Metrics of the server in the format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from megagpt.inference.engine import GenerationEngine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("megagpt_requests", "Answered requests.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "megagpt_request_seconds",
            "Time from a request to the end of its answer.",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "megagpt_first_token_seconds", "Time from a request to its first token.", buckets=SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("megagpt_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated_tokens = Counter("megagpt_generated_tokens", "Tokens of answers.", registry=registry)
        self.cancelled = Counter("megagpt_cancelled_texts", "Texts whose client left.", registry=registry)
        self._running = Gauge("megagpt_running_texts", "Texts in the batch.", registry=registry)
        self._waiting = Gauge("megagpt_waiting_texts", "Texts that wait for a place.", registry=registry)
        self._cache = Gauge("megagpt_cache_share", "Share of the cache's pages in use, 0 to 1.", registry=registry)

    def watch(self, engine: GenerationEngine) -> None:
        """Read the state of an engine whenever the metrics are asked for."""
        self._running.set_function(lambda: engine.n_running)
        self._waiting.set_function(lambda: engine.n_waiting)
        self._cache.set_function(lambda: engine.cache_share)

    def text(self) -> bytes:
        """Return all metrics."""
        return generate_latest(self._registry)
