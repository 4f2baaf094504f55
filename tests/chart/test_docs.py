"""The page on Kubernetes: its commands are run where they can be, its values exist, and its numbers are the chart's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from tests.chart.render import CHART, ROOT, render
from tests.chart.tools import run

PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")


def test_the_commands_of_the_page_install_the_chart(helm: str) -> None:
    [install] = [shlex.split(line) for line in SHELL.splitlines() if line.startswith("helm ")]
    done = run([helm, *install[1:], "--dry-run=client"], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    secret = next(line for line in SHELL.splitlines() if line.startswith("kubectl"))
    for key in ("ticket.key", "redis-password", "auth_token"):
        assert f"--from-literal={key}=" in secret and f"key: {key}" in done.stdout
    build = next(shlex.split(line, comments=True) for line in SHELL.splitlines() if line.startswith("docker"))
    assert (ROOT / build[build.index("-f") + 1]).exists()
    assert f"image: {build[build.index('-t') + 1]}" in done.stdout


def test_the_page_says_what_the_chart_says_when_a_secret_is_missing() -> None:
    checks = (CHART / "templates" / "_checks.tpl").read_text()
    assert "create secret generic baton-secrets" in checks and "create secret generic baton-secrets" in SHELL


def test_the_values_of_the_page_exist(helm: str, tmp_path: Path) -> None:
    """Examples are rendered; a name in a sentence, too, has to be one."""
    for index, example in enumerate(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)):
        path = tmp_path / f"{index}.yaml"
        path.write_text(example)
        rendered = render(helm, "-f", str(path), "--set", "model.path=/models/x,security.existingSecret=s")
        assert rendered.arguments["decode"]["num_gpus"] == 1
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    named = {word for word in re.findall(r"`([a-z]\w+(?:\.\w+)+)`", PAGE) if word.split(".")[0] in values}
    assert len(named) > 10
    assert [word for word in sorted(named) if not exists(values, word.split("."))] == []


def exists(values: Any, path: list[str]) -> bool:
    if not path:
        return True
    return isinstance(values, dict) and path[0] in values and exists(values[path[0]], path[1:])
