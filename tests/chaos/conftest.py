"""What the chaos tests share: how much harm is asked for, and the table of what it came to."""

from __future__ import annotations

import pytest

from tests.chaos.table import Table

TABLE = pytest.StashKey[Table]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = Table()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[TABLE].lines():
        terminalreporter.write_line(line)


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    return request.config.stash[TABLE]


@pytest.fixture
def chaos_full(request: pytest.FixtureRequest) -> bool:
    """Whether to do all the harm, or as much as a quick run can."""
    return bool(request.config.getoption("chaos_full"))
