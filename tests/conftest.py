"""What all tests share: how many seeds of the simulation they run, and which of them need the machine for themselves.

`make simulate` runs many more seeds, by itself. `make test` runs what is marked `alone` after everything else, one by
one: real processes that are killed at some moment, or bounds in seconds. The others share the cores.
"""

from pathlib import Path

import pytest

from baton.quiet_threads import wait_asleep

wait_asleep()  # before any test loads torch: on cores that others use too, threads that spin take twenty times as long

DEFAULT_SEEDS = 50
ALONE = ("alerts", "chaos", "processes", "ray")  # folders, but for what computes and waits for nothing:
SHARING = ("test_corruption.py", "test_device_pages.py", "test_rules.py", "test_same_tokens.py")
HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=DEFAULT_SEEDS, help="seeds for tests marked simulation")
    parser.addoption("--chaos-full", action="store_true", help="tests/chaos: all the harm, instead of a quick part")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that is marked simulation and takes `seed` runs once for each seed."""
    if "seed" in metafunc.fixturenames and metafunc.definition.get_closest_marker("simulation"):
        metafunc.parametrize("seed", range(metafunc.config.getoption("seeds")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(HERE).parts[0] in ALONE and item.path.name not in SHARING:
            item.add_marker(pytest.mark.alone)
