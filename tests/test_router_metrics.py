"""Names and numbers that dashboards read: vLLM's where it has the same thing, with label values from closed sets."""

import asyncio

from prometheus_client import Histogram as ReferenceHistogram
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry
from router_front import HELLO, chat, completion, front, in_process, say, tiny_tokenizer

from router.exposition import merge
from router.histogram import Histogram

TOKENIZER = tiny_tokenizer()
LABELS = {"model_name": "baton-tiny", "engine": "0"}


def samples(text: str) -> dict[str, float]:
    """name{other labels} -> value, for the labels that are not the model's."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            extra = [f"{name}={value}" for name, value in sorted(sample.labels.items()) if name not in LABELS]
            found[sample.name + ("{" + ",".join(extra) + "}" if extra else "")] = sample.value
    return found


async def test_a_request_is_counted_once() -> None:
    generator = say(TOKENIZER, HELLO, cached=4, delay_s=0.002)
    served = front(TOKENIZER, generator)
    async with in_process(served) as client:
        await client.post("/v1/chat/completions", json=chat(stream=True, n=2))
        await client.post("/v1/completions", json=completion("abcdef ghi jkl", max_tokens=3))
        await client.post("/v1/completions", json=completion(n=0))
        await client.post("/v1/completions", json=completion() | {"model": "x"})
    found = samples(served.metrics.text())
    tokens = len(generator.ids)
    prompts = sum(len(request.prompt_ids) for request in generator.requests)
    expected = {
        "vllm:prompt_tokens_total": prompts,
        "vllm:prompt_tokens_cached_total": 8,
        "vllm:generation_tokens_total": 2 * tokens + 3,
        "vllm:request_success_total{finished_reason=stop}": 2,
        "vllm:request_success_total{finished_reason=length}": 1,
        "vllm:time_to_first_token_seconds_count": 2,
        "vllm:inter_token_latency_seconds_count": tokens - 1 + 2,
        "vllm:request_time_per_output_token_seconds_count": 2,
        "vllm:e2e_request_latency_seconds_count": 2,
        "vllm:request_prompt_tokens_sum": prompts,
        "vllm:request_generation_tokens_sum": 2 * tokens + 3,
        "vllm:request_params_max_tokens_count": 2,
        "vllm:request_params_n_sum": 3,
        "baton:requests_total{outcome=ok}": 2,
        "baton:requests_total{outcome=invalid_value}": 1,
        "baton:requests_total{outcome=model_not_found}": 1,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["vllm:inter_token_latency_seconds_sum"] >= 0.002 * (tokens + 1)


async def test_the_saga_counts_here_too() -> None:
    metrics = front(TOKENIZER, say(TOKENIZER, HELLO)).metrics
    metrics.retried("worker_lost")
    metrics.replayed()
    metrics.placed(local=True)
    metrics.placed(local=False)
    found = samples(metrics.text())
    assert found["baton:retries_total{reason=worker_lost}"] == 1
    assert found["baton:replays_total"] == found["baton:placements_total{prefill=local}"] == 1


async def test_clients_cannot_add_series() -> None:
    served = front(TOKENIZER, say(TOKENIZER, HELLO))
    async with in_process(served) as client:
        await client.post("/v1/completions", json=completion())
        before = len(samples(served.metrics.text()))
        for i in range(20):
            await client.post("/v1/completions", json=completion(user=f"u{i}") | {"model": "alias"})
            await client.post("/v1/completions", json=completion(), headers={"x-request-id": f"r{i}"})
            await asyncio.sleep(0)
    assert len(samples(served.metrics.text())) == before


def test_the_histogram_equals_the_librarys() -> None:
    bounds = (0.1, 0.5, 1.0)
    registry, reference = CollectorRegistry(), CollectorRegistry()
    ours = Histogram("x_seconds", "help", {"a": "b"}, bounds)
    registry.register(ours)
    theirs = ReferenceHistogram("x_seconds", "help", ["a"], buckets=bounds, registry=reference).labels("b")
    for value in (0.05, 0.1, 0.3, 0.5, 0.7, 1.0, 5.0):
        ours.observe(value)
        theirs.observe(value)
    wanted = [line for line in generate_latest(reference).decode().splitlines() if "_created" not in line]
    assert generate_latest(registry).decode().splitlines() == wanted


def test_pages_merge_into_one_that_prometheus_reads() -> None:
    first = '# HELP a_total x\n# TYPE a_total counter\na_total{w="0"} 1.0\n'
    first += '# TYPE h histogram\nh_bucket{le="+Inf"} 1\nh_count 1\n'
    second = '# TYPE a_total counter\na_total{w="1"} 2.0\n# TYPE b gauge\nb 5\n\n# a remark\n'
    merged = merge([first, second, ""])
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert [sample.value for sample in families["a"].samples] == [1.0, 2.0]
    assert set(families) == {"a", "h", "b"}
    assert merged.count("# TYPE a_total") == 1
    assert merge([]) == ""


def test_equal_series_are_kept_once() -> None:
    page = '# TYPE b gauge\nb{x="a b"} 5\n'
    assert merge([page, page]) == page
