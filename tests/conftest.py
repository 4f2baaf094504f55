"""What all tests share: how many seeds of the simulation they run. `make simulate` runs many more, by itself."""

import pytest

from baton.quiet_threads import wait_asleep

wait_asleep()  # before any test loads torch: on cores that others use too, threads that spin take twenty times as long

DEFAULT_SEEDS = 50


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=DEFAULT_SEEDS, help="seeds for tests marked simulation")
    parser.addoption("--chaos-full", action="store_true", help="tests/chaos: all the harm, instead of a quick part")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that is marked simulation and takes `seed` runs once for each seed."""
    if "seed" in metafunc.fixturenames and metafunc.definition.get_closest_marker("simulation"):
        metafunc.parametrize("seed", range(metafunc.config.getoption("seeds")))
