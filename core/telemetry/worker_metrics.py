"""A worker's metrics: vLLM's names where vLLM has the same thing, `baton:` for the rest.

Every series carries `model_name` and `engine` (the worker's name), so that one page can show all workers of a router.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from core.clock import Clock
from core.telemetry.drain_metrics import DrainMetrics
from core.telemetry.handoff_metrics import HandoffMetrics
from core.telemetry.last_seconds import LastSeconds
from core.telemetry.path_metrics import PathMetrics
from core.telemetry.reclaim import Reclaims

LABELS = ("model_name", "engine")
TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class WorkerMetrics:
    """One per worker process, with a registry of its own."""

    def __init__(self, model_name: str, worker: str, clock: Clock) -> None:
        self._registry = CollectorRegistry()
        self._where = (model_name, worker)
        self._running = self._gauge("vllm:num_requests_running", "Requests that generate tokens")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait for prefill, pages or a hand-off")
        self._usage = self._gauge("vllm:kv_cache_usage_perc", "Share of the pages that somebody holds; 1 is all")
        self._queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self._fetched = self._counter("baton:fetched_tokens", "Prompt tokens fetched from another worker's cache")
        self._preemptions = self._counter("vllm:num_preemptions", "Sequences that gave their pages back unfinished")
        self._refused = self._counter("baton:tickets_refused", "Requests that no valid ticket came with")
        self._local = self._counter("baton:local_prefills", "Prompts that the decode worker prefilled itself")
        self._pages = self._gauge("baton:pages", "Pages by the state of their strongest holder", "state")
        self._step_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens of one step", TOKEN_BUCKETS)
        self._step_s = self._histogram("baton:step_seconds", "Duration of one step", STEP_BUCKETS_S)
        labels = dict(zip(LABELS, self._where, strict=True))
        self._lag_s = self._histogram(
            "baton:loop_lag_seconds", "How late the event loop came round: leases are renewed by it", STEP_BUCKETS_S
        )
        self.handoffs = HandoffMetrics(self._registry, labels)
        self.paths = PathMetrics(self._registry, labels)
        self.drains = DrainMetrics(self._registry, labels)
        self.lately = LastSeconds(clock)
        self.reclaims = Reclaims(clock, self.handoffs.reclaimed)

    def cache_config(self, page_size: int, pages: int) -> None:
        """vLLM's info metric: the Gateway API inference extension reads both labels."""
        info = Gauge(
            "vllm:cache_config_info",
            "Geometry of the page pool",
            (*LABELS, "block_size", "num_gpu_blocks"),
            registry=self._registry,
        )
        info.labels(*self._where, str(page_size), str(pages)).set(1)

    def role(self, name: str) -> None:
        """Which tier this worker is of: dashboards and alerts join its other series with it."""
        info = Gauge("baton:worker_info", "1, with the worker's role", (*LABELS, "role"), registry=self._registry)
        info.labels(*self._where, name).set(1)

    def step(self, tokens: int, step_s: float) -> None:
        self._step_tokens.labels(*self._where).observe(tokens)
        self._step_s.labels(*self._where).observe(step_s)

    def loop_lag(self, lag_s: float) -> None:
        """Between steps only: a step that keeps the interpreter to itself shows here."""
        self._lag_s.labels(*self._where).observe(lag_s)

    def requests(self, running: int, waiting: int) -> None:
        self._running.labels(*self._where).set(running)
        self._waiting.labels(*self._where).set(waiting)

    def pages(self, counts: dict[str, int]) -> None:
        for state, count in counts.items():
            self._pages.labels(*self._where, state).set(count)
        total = sum(counts.values())
        held = total - counts.get("free", 0) - counts.get("cached", 0)
        self._usage.labels(*self._where).set(held / total if total else 0.0)

    def prefix(self, queried_tokens: int, hit_tokens: int) -> None:
        self._queries.labels(*self._where).inc(queried_tokens)
        self._hits.labels(*self._where).inc(hit_tokens)

    def fetched(self, tokens: int) -> None:
        self._fetched.labels(*self._where).inc(tokens)

    def preempted(self, sequences: int) -> None:
        self._preemptions.labels(*self._where).inc(sequences)

    def ticket_refused(self) -> None:
        self._refused.labels(*self._where).inc()

    def local_prefill(self) -> None:
        self._local.labels(*self._where).inc()

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(name, what, (*LABELS, *labels), registry=self._registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        counter = Counter(name, what, (*LABELS, *labels), registry=self._registry)
        if not labels:
            counter.labels(*self._where)  # a series that is there from the start shows a zero, not a gap
        return counter

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, what, LABELS, buckets=buckets, registry=self._registry)
