"""Writes `baton.json`, the Grafana dashboard: `python deploy/grafana/generate.py`.

The rows follow one request: what users see, queue, prefill, exposed transfer, decode; then pairs, pages, tiers,
registry, errors, drains. Several routers show the same workers: what a worker counts is reduced by `max` over the pages
that show it before it is summed. A test writes the file again, and compares.
"""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphTresholdsStyleMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, Threshold, ThresholdsMode, VariableRefresh

FILE = Path(__file__).with_name("baton.json")
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
ROUTER = 'namespace=~"$namespace"'
WORKER = 'namespace=~"$namespace",model_name=~"$model"'
FIRST_TOKEN_SLO_S, TOKEN_GAP_SLO_S = 2.5, 0.1  # as in deploy/alerts/baton.rules.yaml
WORKER_BY = "job, namespace, model_name, engine"
Target = tuple[str, str]  # expression, legend
Panel = tuple[str, str, list[Target]]  # title, unit, targets


def quantiles(metric: str, where: str, by: str = "", legend: str = "") -> list[Target]:
    """Median, p95 and p99 of a histogram over the last minutes."""
    groups = f"le, {by}" if by else "le"
    rate = f"sum by ({groups}) (rate({metric}_bucket{{{where}}}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {rate})", f"p{q * 100:g}{legend}") for q in (0.5, 0.95, 0.99)]


def once(inner: str, by: str) -> str:
    """Each worker once, however many routers show it."""
    return f"max by ({WORKER_BY}{', ' + by if by else ''}) ({inner})"


def rate(metric: str, where: str, by: str) -> str:
    own = ", ".join(label for label in by.split(", ") if label != "engine")
    return f"sum by ({by}) ({once(f'rate({metric}{{{where}}}[$__rate_interval])', own)})"


def mean(metric: str, where: str) -> str:
    """What one observation was on average, of each worker."""
    total, count = (once(f"rate({metric}_{part}{{{where}}}[$__rate_interval])", "") for part in ("sum", "count"))
    return f"sum by (engine) ({total}) / (sum by (engine) ({count}) > 0)"


def rows() -> list[tuple[str, list[Panel]]]:
    return [
        ("What users see", _seen()),
        ("Queue", _queue()),
        ("Prefill", _prefill()),
        ("Exposed transfer", _transfer()),
        ("Decode", _decode()),
        ("Hand-offs by pair and by state", _handoffs()),
        ("Pages by state", _pages()),
        ("Tiers", _tiers()),
        ("Registry", _registry()),
        ("Errors and drains", _errors()),
    ]


def _seen() -> list[Panel]:
    calls = f"sum by (outcome) (rate(baton:requests_total{{{ROUTER}}}[$__rate_interval])) > 0"
    tokens = f"sum(rate(vllm:generation_tokens_total{{{WORKER}}}[$__rate_interval]))"
    prompts = f"sum(rate(vllm:prompt_tokens_total{{{WORKER}}}[$__rate_interval]))"
    return [
        ("Time to first token", "s", quantiles("vllm:time_to_first_token_seconds", WORKER)),
        ("Time between tokens", "s", quantiles("vllm:inter_token_latency_seconds", WORKER)),
        ("Calls by outcome", "reqps", [(calls, "{{outcome}}")]),
        ("Tokens", "short", [(tokens, "generated per second"), (prompts, "of prompts per second")]),
    ]


def _queue() -> list[Panel]:
    waiting = f"sum by (engine) ({once(f'vllm:num_requests_waiting{{{WORKER}}}', '')})"
    queued = f'baton:handoff_state_seconds_sum{{{WORKER},end="receiver",state="queued"}}'
    lasted = queued.replace("_sum", "_count")
    wait = (
        f"sum by (engine) ({once(f'rate({queued}[$__rate_interval])', '')})"
        f" / (sum by (engine) ({once(f'rate({lasted}[$__rate_interval])', '')}) > 0)"
    )
    return [
        ("Admitted calls", "short", [(f"sum(baton:router_inflight_requests{{{ROUTER}}})", "in flight")]),
        (
            "Prompt tokens without a first token",
            "short",
            [(f"sum(baton:router_queued_prompt_tokens{{{ROUTER}}})", "tokens")],
        ),
        ("Requests that wait", "short", [(waiting, "{{engine}}")]),
        ("Wait for the prompt's hand-off", "s", [(wait, "{{engine}}")]),
    ]


def _prefill() -> list[Panel]:
    hits = rate("vllm:prefix_cache_hits_total", WORKER, "engine")
    queries = rate("vllm:prefix_cache_queries_total", WORKER, "engine")
    placements = f"sum by (prefill) (rate(baton:placements_total{{{ROUTER}}}[$__rate_interval]))"
    return [
        ("Mean duration of a step", "s", [(mean("baton:step_seconds", WORKER), "{{engine}}")]),
        ("Mean tokens of a step", "short", [(mean("vllm:iteration_tokens_total", WORKER), "{{engine}}")]),
        ("Found in the prefix cache", "percentunit", [(f"{hits} / ({queries} > 0)", "{{engine}}")]),
        ("Attempts by who prefills", "reqps", [(placements, "{{prefill}}")]),
    ]


def _transfer() -> list[Panel]:
    hidden, moved = (rate(f"baton:{name}_bytes_total", WORKER, "engine") for name in ("hidden", "transferred"))
    return [
        ("Exposed: from seal to commit", "s", quantiles("baton:exposed_transfer_seconds", WORKER)),
        ("Under way", "s", quantiles("baton:transfer_seconds", WORKER)),
        ("Bytes taken in", "Bps", [(moved, "{{engine}}")]),
        ("Share of them that compute hid", "percentunit", [(f"{hidden} / ({moved} > 0)", "{{engine}}")]),
    ]


def _decode() -> list[Panel]:
    running = f"sum by (engine) ({once(f'vllm:num_requests_running{{{WORKER}}}', '')})"
    usage = f"sum by (engine) ({once(f'vllm:kv_cache_usage_perc{{{WORKER}}}', '')})"
    return [
        ("Requests that generate", "short", [(running, "{{engine}}")]),
        ("Pages in use", "percentunit", [(usage, "{{engine}}")]),
        ("Preemptions", "ops", [(rate("vllm:num_preemptions_total", WORKER, "engine"), "{{engine}}")]),
        ("Prompts prefilled here", "ops", [(rate("baton:local_prefills_total", WORKER, "engine"), "{{engine}}")]),
    ]


def _handoffs() -> list[Panel]:
    ended = rate("baton:pair_handoffs_total", WORKER, "peer, engine, outcome")
    in_flight = f"sum by (end, state) ({once(f'baton:handoffs_in_flight{{{WORKER}}}', 'end, state')})"
    speed = f"max by (peer, engine, transport) (baton:path_bytes_per_second{{{WORKER}}})"
    degraded = f"max by (peer, engine, transport) (baton:path_degraded{{{WORKER}}}) > 0"
    return [
        ("By pair and outcome", "ops", [(f"{ended} > 0", "{{peer}} to {{engine}}: {{outcome}}")]),
        ("Under way, by state", "short", [(in_flight, "{{end}}: {{state}}")]),
        ("Bandwidth of each pair", "Bps", [(speed, "{{peer}} to {{engine}}: {{transport}}")]),
        ("Pairs on another path than the best", "short", [(degraded, "{{peer}} to {{engine}}: {{transport}}")]),
    ]


def _pages() -> list[Panel]:
    by_state = f"sum by (state) ({once(f'baton:pages{{{WORKER}}}', 'state')})"
    held = f'sum by (engine, state) ({once(f"""baton:pages{{{WORKER},state=~"leased|quarantined"}}""", "state")})'
    return [
        ("All workers", "short", [(by_state, "{{state}}")]),
        ("Held for a peer", "short", [(held, "{{engine}}: {{state}}")]),
        ("From a cancel until its pages are free", "s", quantiles("baton:cancel_to_reclaim_seconds", WORKER)),
    ]


def _tiers() -> list[Panel]:
    desired = f"max by (tier) (baton:tier_desired_workers{{{ROUTER}}})"
    states = f"max by (tier, state) (baton:tier_workers{{{ROUTER}}})"
    decisions = f"max by (tier, direction) (increase(baton:tier_decisions_total{{{ROUTER}}}[$__rate_interval]))"
    return [
        ("Workers by state", "short", [(states, "{{tier}}: {{state}}"), (desired, "{{tier}}: desired")]),
        ("Scaling decisions", "short", [(decisions, "{{tier}}: {{direction}}")]),
    ]


def _registry() -> list[Panel]:
    return [
        ("Answers", "bool_yes_no", [(f"min by (instance) (baton:registry_up{{{ROUTER}}})", "{{instance}}")]),
        (
            "Age of the view",
            "s",
            [(f"max by (instance) (baton:cluster_view_age_seconds{{{ROUTER}}})", "{{instance}}")],
        ),
    ]


def _errors() -> list[Panel]:
    failed = f'sum by (outcome) (rate(baton:requests_total{{{ROUTER},outcome!~"ok|cancelled"}}[$__rate_interval])) > 0'
    retries = f"sum by (reason) (rate(baton:retries_total{{{ROUTER}}}[$__rate_interval])) > 0"
    faults = rate("baton:handoff_faults_total", WORKER, "peer, engine, code")
    deadlines = rate("baton:handoff_deadlines_total", WORKER, "end, state")
    drains = f"sum by (outcome) ({once(f'increase(baton:drain_total{{{WORKER}}}[$__rate_interval])', 'outcome')})"
    draining = f"sum by (engine) ({once(f'baton:drain_seconds{{{WORKER}}}', '')}) > 0"
    return [
        ("Calls that failed", "reqps", [(failed, "{{outcome}}")]),
        ("Attempts that were followed by another", "reqps", [(retries, "{{reason}}")]),
        ("Faults of fetches", "ops", [(f"{faults} > 0", "{{peer}} to {{engine}}: {{code}}")]),
        ("Deadlines that passed", "ops", [(f"{deadlines} > 0", "{{end}}: {{state}}")]),
        ("Drains by how they ended", "short", [(drains, "{{outcome}}")]),
        ("Draining since", "s", [(draining, "{{engine}}")]),
    ]


SLOS = {"Time to first token": FIRST_TOKEN_SLO_S, "Time between tokens": TOKEN_GAP_SLO_S}


def _panel(title: str, unit: str, targets: list[Target]) -> timeseries.Panel:
    panel = timeseries.Panel().title(title).unit(unit).datasource(SOURCE).min(0).height(7).span(6).fill_opacity(8)
    for number, (expr, legend) in enumerate(targets):
        panel.with_target(prometheus.Dataquery().ref_id(chr(ord("A") + number)).expr(expr).legend_format(legend))
    if title in SLOS:
        steps = [Threshold(value=None, color="transparent"), Threshold(value=SLOS[title], color="red")]
        panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        panel.thresholds_style(_line())
    return panel


def _line() -> common.GraphThresholdsStyleConfig:
    return common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.LINE)


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(label).datasource(SOURCE).query(query).multi(True)
    return variable.include_all(True).all_value(".*").refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)


def text() -> str:
    """The file's content."""
    board = (
        dashboard.Dashboard("Baton")
        .uid("baton")
        .tags(["baton", "llm"])
        .description("One request's way through the tiers, and what holds it up")
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_variable("namespace", "Namespace", "label_values(baton:router_inflight_requests, namespace)"))
        .with_variable(_variable("model", "Model", "label_values(vllm:time_to_first_token_seconds_count, model_name)"))
    )
    for title, panels in rows():
        board.with_row(dashboard.Row(title))
        for panel in panels:
            board.with_panel(_panel(*panel))
    return JSONEncoder(sort_keys=True, indent=1).encode(board.build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
