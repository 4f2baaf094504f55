"""Clusters that several tests share: none of these tests may leave one worse than it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processes.cluster import Cluster, serving


@pytest.fixture(scope="package")
def disaggregated() -> Iterator[Cluster]:
    """One prefill and one decode worker."""
    with serving() as cluster:
        yield cluster


@pytest.fixture(scope="package")
def aggregated() -> Iterator[Cluster]:
    """Two workers that each do both."""
    with serving("--aggregated") as cluster:
        yield cluster
