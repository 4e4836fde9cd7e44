"""The metrics of the service, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Metrics of one service."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "interleave_requests", "Requests by HTTP status (499: the client left).", ["status"], registry=registry
        )
        self.seconds = Histogram(
            "interleave_request_seconds", "Seconds per answered request.", buckets=SECONDS, registry=registry
        )
        self.generation_seconds = Histogram(
            "interleave_generation_seconds", "Seconds of it in a worker.", buckets=SECONDS, registry=registry
        )
        self.batch_size = Histogram(
            "interleave_batch_size", "Images generated at once.", buckets=SIZES, registry=registry
        )
        self.cancelled = Counter(
            "interleave_cancelled", "Requests dropped at their deadline or because the client left.", registry=registry
        )
        self.restarts = Counter("interleave_worker_restarts", "Workers that died and were replaced.", registry=registry)
        self.queue = Gauge("interleave_queue_length", "Requests that wait for a worker.", registry=registry)
        self.running = Gauge("interleave_running", "Requests with workers.", registry=registry)
        self.ready = Gauge("interleave_ready", "1 while a worker is ready.", registry=registry)
