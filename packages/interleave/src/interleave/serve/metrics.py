"""What the service counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one service."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "interleave_requests", "Requests for pictures by answer (499: client left).", ["status"], registry=registry
        )
        self.seconds = Histogram(
            "interleave_request_seconds", "Seconds per picture sent.", buckets=SECONDS, registry=registry
        )
        self.draw_seconds = Histogram(
            "interleave_draw_seconds", "Seconds of those in a worker.", buckets=SECONDS, registry=registry
        )
        self.batch_size = Histogram(
            "interleave_batch_size", "Pictures drawn at once.", buckets=SIZES, registry=registry
        )
        self.cancelled = Counter(
            "interleave_cancelled",
            "Requests dropped without a picture, by deadline or because the client left.",
            registry=registry,
        )
        self.restarts = Counter("interleave_worker_restarts", "Workers that died and were replaced.", registry=registry)
        self.queue = Gauge("interleave_queue_length", "Requests that wait for a worker.", registry=registry)
        self.running = Gauge("interleave_running", "Requests with workers.", registry=registry)
        self.ready = Gauge("interleave_ready", "1 while a worker is ready.", registry=registry)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
