"""`baton k8s doctor`: looks at a Kubernetes cluster and at a release of the chart in it, and says what is wrong."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

from baton.doctor import said
from baton.doctor_judgement import Finding
from baton.k8s.api import Api, Unreadable, outside
from baton.k8s.facts import Facts
from baton.k8s.gathering import Gathering
from baton.k8s.judgement import judge
from core.errors import ConfigError

EXPLAINED = """\
`baton k8s doctor` reads a cluster's definitions, permissions, nodes and versions, and what a release of the chart asks
for: devices, Secrets, claims, memory. It changes nothing, and shows no Secret's content.

  baton k8s doctor                                  the current context and namespace
  baton k8s doctor --namespace llm --release chat   one release
"""
EPILOG = "Exit code: 0 when all is well, 1 when something is wrong, 2 when there is no cluster to ask."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = EXPLAINED, EPILOG
    parser.add_argument("what", choices=("doctor",), help="what to do")
    parser.add_argument("--namespace", default="", help="where the release is (the context's own)")
    parser.add_argument("--release", default="", help="name of the Helm release (the first one that there is)")
    parser.add_argument("--context", default="", help="context of the kubeconfig (the current one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: findings, and what was found")


def run(args: argparse.Namespace, open_api: Callable[[str], tuple[Api, str]] = outside) -> int:
    """0, or 1 when something is wrong. Raises ConfigError."""
    api, namespace = open_api(args.context)
    try:
        facts = Gathering(api, args.namespace or namespace, args.release).facts()
    except Unreadable as error:
        raise ConfigError(f"the API server does not answer: {error.reason}") from error
    finally:
        api.close()
    findings = judge(facts)
    print(as_json(facts, findings) if args.json else "\n".join([*seen(facts), *sentences(findings)]))
    return int(any(finding.wrong for finding in findings))


def sentences(findings: list[Finding]) -> list[str]:
    return said(findings) if findings else ["", "the cluster is as it should be"]


def seen(facts: Facts) -> list[str]:
    """One line on the cluster, one for each tier."""
    devices: dict[str, int] = {}
    for node in facts.nodes:
        for name, count in node.allocatable.items():
            devices[name] = devices.get(name, 0) + count
    has = ", ".join(f"{count} {name}" for name, count in sorted(devices.items()) if count) or "no devices"
    lines = [f"Kubernetes {facts.kubernetes or '?'}, namespace {facts.namespace}, {len(facts.nodes)} nodes, {has}"]
    for tier in facts.release.tiers if facts.release else ():
        asks = ", ".join(f"{count} {name}" for name, count in sorted(tier.devices.items())) or "no devices"
        lines.append(f"  {tier.name:8s} {tier.min} to {tier.max} pods, each {asks}, {tier.image}")
    return lines


def as_json(facts: Facts, findings: list[Finding]) -> str:
    found = {
        "kubernetes": facts.kubernetes,
        "namespace": facts.namespace,
        "release": facts.release.name if facts.release else "",
        "nodes": {node.name: dict(node.allocatable) for node in facts.nodes},
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(found, indent=2)
