"""What the tests on Ray share: a registry, a cluster of one node, and the answers of a server without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.processes.answers import Answer
from tests.processes.cluster import started
from tests.ray.cluster import RayCluster, ray_cluster
from tests.ray.load import answers_of
from tests.redis_server import RedisServer, redis_server
from tests.servers import need


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def right() -> dict[str, Answer]:
    """What `baton serve` answers."""
    need("ray")
    with started() as plain:
        return asyncio.run(answers_of(plain.url))


@pytest.fixture(scope="module")
def cluster(redis: RedisServer, right: dict[str, Answer]) -> Iterator[RayCluster]:
    """One node; nothing is deployed."""
    with ray_cluster(redis.url) as one:
        one.start_head(cpus=16)
        yield one
