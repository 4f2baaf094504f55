"""The files under deploy/ and docs/runbooks as tests read them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import yaml

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "alerts" / "baton.rules.yaml"
UNIT_TESTS = sorted((ROOT / "deploy" / "alerts" / "tests").glob("*.yaml"))
DASHBOARD = ROOT / "deploy" / "grafana" / "baton.json"
RUNBOOKS = ROOT / "docs" / "runbooks"
RECORDED = "baton_rule:"
DURATION = re.compile(r"(?<=\[)(\d+)([mhd])(?=\])|(?<=for: )(\d+)([mhd])\b")
SHORTER = {"m": (1, "s"), "h": (1, "m"), "d": (24, "m")}  # sixty times


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, list[dict[str, Any]]]:
    """By name: one name may stand for two severities."""
    found: dict[str, list[dict[str, Any]]] = {}
    for rule in rules():
        if "alert" in rule:
            found.setdefault(rule["alert"], []).append(rule)
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> list[str]:
    """With Grafana's own variables filled in."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [expr.replace("$__rate_interval", "5m") for expr in found]


def parse(expr: str) -> Any:
    """Raises ValueError where it is not PromQL."""
    return promql_parser.parse(expr)


def selectors(node: Any) -> Iterator[Any]:
    """Every selector of series in a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for field in ("expr", "lhs", "rhs", "param", "vector_selector"):
        if getattr(node, field, None) is not None:
            yield from selectors(getattr(node, field))
    for argument in getattr(node, "args", None) or ():
        yield from selectors(argument)


def names(expr: str) -> set[str]:
    return {selector.name for selector in selectors(parse(expr))}


def patient(text: str) -> str:
    """The rules with SLOs that a busy machine keeps too; 80 s are an edge of both histograms."""
    return re.sub(r'le="[\d.]+"', 'le="80.0"', text)


def sixty_times_faster(text: str) -> str:
    """The rules with every window and every `for` shortened: a minute is a second, an hour a minute."""

    def shorter(found: re.Match[str]) -> str:
        number, unit = found[1] or found[3], found[2] or found[4]
        factor, new = SHORTER[unit]
        return f"{int(number) * factor}{new}"

    return DURATION.sub(shorter, text)
