"""Rules, runbooks and the dashboard, without a running Baton."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from core.errors import leaves
from router.metrics import TOKEN_S, TTFT_S
from tests.alerts.rules import (
    DASHBOARD,
    ROOT,
    RULES,
    RUNBOOKS,
    UNIT_TESTS,
    alerts,
    dashboard_expressions,
    names,
    panels,
    parse,
    rules,
    selectors,
    sixty_times_faster,
)
from tests.servers import need

SECTIONS = ["What it means", "What users notice", "How to check", "What to do", "How to silence it"]
MARK = re.compile(r'(\d[\d.]*m?)"? # threshold (\w+)$', re.MULTILINE)
LISTED = re.compile(r"^#   (\w+) +(\S+)", re.MULTILINE)
SLOS = {"vllm:time_to_first_token_seconds": TTFT_S, "vllm:inter_token_latency_seconds": TOKEN_S}


def promtool(*arguments: str, folder: Path = ROOT) -> str:
    ran = subprocess.run(
        [need("promtool"), *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


# --- rules -----------------------------------------------------------------------------------------------------


def test_prometheus_takes_the_rules() -> None:
    assert "SUCCESS" in promtool("check", "rules", str(RULES))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("file", UNIT_TESTS, ids=lambda path: path.stem)
def test_alerts_fire_and_are_silent(file: Path) -> None:
    promtool("test", "rules", file.name, folder=file.parent)


def test_every_alert_is_tested_for_firing_and_for_silence() -> None:
    fires, silent = set(), set()
    for file in UNIT_TESTS:
        for case in yaml.safe_load(file.read_text())["tests"]:
            said = [sample["labels"] for test in case["promql_expr_test"] for sample in test["exp_samples"]]
            here = set(re.findall(r'alertname="(\w+)", severity="(\w+)"', " ".join(said)))
            fires |= here
            if any(not test["exp_samples"] for test in case["promql_expr_test"]):
                silent.add(case["name"].partition(" ")[0])
    assert fires == {(name, rule["labels"]["severity"]) for name, both in alerts().items() for rule in both}
    assert set(alerts()) <= silent


def test_each_alert_says_what_how_much_and_where_to_read_on() -> None:
    for name, both in alerts().items():
        for rule in both:
            annotations = rule["annotations"]
            assert rule["labels"] == {"severity": rule["labels"]["severity"]}, name
            assert rule["labels"]["severity"] in ("page", "ticket"), name
            assert annotations["summary"] and "$value" in annotations["description"], name
            assert annotations["runbook_url"] == f"docs/runbooks/{name}.md"
    assert len(alerts()) >= 10


def test_a_slo_is_an_edge_of_its_histogram() -> None:
    """Else there is no such bucket, and the alert would never fire."""
    edges = set()
    for rule in rules():
        for selector in selectors(parse(rule["expr"])):
            for matcher in selector.matchers.matchers:
                if matcher.name == "le":
                    metric = selector.name.removesuffix("_bucket")
                    assert matcher.value in map(str, SLOS[metric]), rule
                    edges.add((metric, matcher.value))
    assert len(edges) == 2, "one for each"


def test_every_fault_of_ours_burns_the_budget_and_no_other() -> None:
    kept_out = {
        code
        for rule in rules()
        if "errors:ratio" in rule.get("record", "")
        for selector in selectors(parse(rule["expr"]))
        for matcher in selector.matchers.matchers
        for code in matcher.value.split("|")
    }
    assert kept_out == {"ok"} | {code for code, error in leaves().items() if error.http_status < 500}


def test_thresholds_are_those_that_the_head_of_the_file_lists() -> None:
    text = RULES.read_text()
    head, _, body = text.partition("\ngroups:")
    listed = dict(LISTED.findall(head))
    marked = {(name, value) for value, name in MARK.findall(body)}
    assert marked == set(listed.items())
    assert body.count("# threshold") == len(MARK.findall(body)), "one that the mark's form does not fit"


def test_no_window_of_the_rules_is_left_long() -> None:
    fast = sixty_times_faster(RULES.read_text())
    assert set(re.findall(r"\[(\w+)\]", fast)) == {"5s", "10s", "15s", "30s", "1m", "6m", "72m"}
    assert set(re.findall(r"for: (\w+)", fast)) == {"1s", "2s", "5s", "10s", "1m"}


# --- runbooks --------------------------------------------------------------------------------------------------


def test_every_alert_has_its_page_and_every_page_its_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == set(alerts())


@pytest.mark.parametrize("name", sorted(alerts()))
def test_a_page_tells_what_to_do(name: str) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text()
    assert text.startswith(f"# {name}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    assert f"alertname={name}" in text
    assert "```bash" in text
    for other in re.findall(r"\bBaton[A-Z]\w+", text):
        assert other in alerts(), other
    for expr in re.findall(r"```promql\n(.+?)\n```", text, re.DOTALL):
        parse(expr)


# --- the dashboard ---------------------------------------------------------------------------------------------


def test_the_dashboard_is_what_its_generator_writes() -> None:
    pytest.importorskip("grafana_foundation_sdk")
    import importlib.util

    spec = importlib.util.spec_from_file_location("generate", DASHBOARD.with_name("generate.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.text() == DASHBOARD.read_text()


def test_every_panel_asks_something() -> None:
    for expr in dashboard_expressions():
        assert names(expr), expr
    assert all(panel["title"] and panel["targets"] for panel in panels())


def test_the_dashboard_shows_one_requests_way_and_the_slos_of_the_alerts() -> None:
    board = json.loads(DASHBOARD.read_text())
    titles = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert titles[1:5] == ["Queue", "Prefill", "Exposed transfer", "Decode"]
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "namespace", "model"]
    lines = {
        panel["title"]: str(panel["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"])
        for panel in panels()
        if "thresholds" in panel["fieldConfig"]["defaults"]
    }
    slos = dict(LISTED.findall(RULES.read_text()))
    assert lines == {"Time to first token": slos["ttftSlo"], "Time between tokens": slos["tokenGapSlo"]}
