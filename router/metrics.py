"""What the router counts: vLLM's names where vLLM has the same thing, `baton:` for the rest.

Label values come from closed sets (error codes, finish reasons, the served model): no client can add a series.
Per token there is one observation; everything else is counted once per request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from core.errors import StartupError, leaves
from core.messages import FinishReason
from router.admission import Admission
from router.generation import GenerationRequest
from router.histogram import Histogram
from router.output import Output

TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
          80.0, 160.0, 640.0, 2560.0)  # fmt: skip
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
E2E_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
         960.0, 1920.0, 7680.0)  # fmt: skip
SIZES = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


class RouterMetrics:
    """A registry of its own. The saga calls `retried`, `replayed` and `placed`; the handler the rest."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._admission: Admission | None = None
        self._add_histograms()
        self._add_counters()

    def _add_histograms(self) -> None:
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "Time to first token.", TTFT_S)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Time between tokens.", TOKEN_S)
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per output token of a request.", TOKEN_S
        )
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "Time from arrival to end.", E2E_S)
        self.prompt_size = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", SIZES)
        self.generation_size = self._histogram("request_generation_tokens", "Tokens generated for it.", SIZES)
        self.max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request.", SIZES)
        self.n = self._histogram("request_params_n", "Choices of a request.", (1.0, 2.0, 5.0, 10.0, 20.0))

    def _add_counters(self) -> None:
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self.cached_tokens = self._counter("prompt_tokens_cached", "Prompt tokens found in a prefix cache.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        success = Counter(
            "vllm:request_success", "Choices finished.", [*self._labels, "finished_reason"], registry=self.registry
        )
        self._success = {
            reason.value: success.labels(**self._labels, finished_reason=reason.value) for reason in FinishReason
        }
        self._outcomes = Counter("baton:requests", "Calls by how they ended.", ["outcome"], registry=self.registry)
        self._retries = Counter("baton:retries", "Attempts after the first.", ["reason"], registry=self.registry)
        self._replays = Counter("baton:replays", "Attempts that went on mid-stream.", registry=self.registry)
        for code in ("ok", *_codes()):  # there from the start: a rate does not miss the first failure
            self._outcomes.labels(code)
        for code in _codes():
            self._retries.labels(code)
        placements = Counter("baton:placements", "Attempts by who prefills.", ["prefill"], registry=self.registry)
        self._placed_local, self._placed_remote = placements.labels("local"), placements.labels("remote")

    def _histogram(self, name: str, help_text: str, bounds: Sequence[float]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", help_text, self._labels, bounds)
        self.registry.register(histogram)
        return histogram

    def _counter(self, name: str, help_text: str) -> Counter:
        counter = Counter(f"vllm:{name}", help_text, list(self._labels), registry=self.registry)
        return counter.labels(**self._labels)

    @property
    def admitted(self) -> tuple[int, int]:
        """Choices admitted and not ended, and prompt tokens without a first token."""
        return (self._admission.requests, self._admission.queued_tokens) if self._admission else (0, 0)

    def watch(self, admission: Admission) -> None:
        """Shows what is admitted at the moment."""
        self._admission = admission
        for name, help_text, value in (
            ("inflight_requests", "Choices admitted and not ended.", lambda: admission.requests),
            ("queued_prompt_tokens", "Prompt tokens without a first token.", lambda: admission.queued_tokens),
        ):
            Gauge(f"baton:router_{name}", help_text, registry=self.registry).set_function(value)

    def retried(self, reason: str) -> None:
        """An attempt has failed, with this error code, and another follows."""
        self._retries.labels(reason).inc()

    def replayed(self) -> None:
        self._replays.inc()

    def placed(self, local: bool) -> None:
        (self._placed_local if local else self._placed_remote).inc()

    def count_outcome(self, outcome: str) -> None:
        """`outcome` is "ok" or the code of a core error: a closed set."""
        self._outcomes.labels(outcome).inc()

    @contextmanager
    def account(self, requests: Sequence[GenerationRequest], output: Output, arrived: float) -> Iterator[CallClocks]:
        """Counts what the call's requests cost, however the block ends."""
        clocks = CallClocks(len(requests), arrived, self)
        try:
            yield clocks
        finally:
            for number, request in enumerate(requests):
                self._count(number, request, output, clocks)

    def _count(self, number: int, request: GenerationRequest, output: Output, clocks: CallClocks) -> None:
        first, last = clocks.first[number], clocks.last[number]
        generated = output.generated_tokens(number)
        if first is None or last is None or not generated:
            return
        self.prompt_tokens.inc(len(request.prompt_ids))
        self.cached_tokens.inc(output.cached_tokens(number))
        self.generation_tokens.inc(generated)
        self.prompt_size.observe(len(request.prompt_ids))
        self.generation_size.observe(generated)
        self.max_tokens.observe(request.params.max_tokens)
        self.n.observe(request.params.n)
        for reason in output.finish_reasons(number):
            self._success[reason].inc()
        per_choice = generated / request.params.n
        if per_choice > 1:
            self.per_token.observe((last - first) / (per_choice - 1))
        self.end_to_end.observe(last - clocks.arrived)

    def text(self) -> str:
        """The exposition format of the router's own metrics."""
        return generate_latest(self.registry).decode()


def _codes() -> list[str]:
    """Of every error that a call may end with."""
    return [code for code, error in leaves().items() if not issubclass(error, StartupError)]


class CallClocks:
    """When the first and the latest tokens of each request of a call came."""

    def __init__(self, requests: int, arrived: float, metrics: RouterMetrics) -> None:
        self.arrived = arrived
        self.first: list[float | None] = [None] * requests
        self.last: list[float | None] = [None] * requests
        self._metrics = metrics

    def tick(self, number: int, now: float) -> bool:
        """A step of request `number` has come. True for its first."""
        last = self.last[number]
        self.last[number] = now
        if last is not None:
            self._metrics.inter_token.observe(now - last)
            return False
        self.first[number] = now
        self._metrics.time_to_first_token.observe(now - self.arrived)
        return True
