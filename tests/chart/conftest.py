"""What the tests of the chart share: a helm of each major, and every case rendered by each, once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.chart import tools
from tests.chart.render import CASES, Rendered, case

Cases = Callable[[int, str], Rendered]


@pytest.fixture(scope="session")
def helm() -> str:
    """The newest one."""
    return tools.helm(max(tools.HELM))


@pytest.fixture(scope="session")
def cases() -> Cases:
    return cache(lambda major, name: case(tools.helm(major), name))


@pytest.fixture(params=CASES)
def rendered(request: pytest.FixtureRequest, cases: Cases) -> Rendered:
    return cases(max(tools.HELM), request.param)
