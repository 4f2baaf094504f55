"""`baton serve --ray`: a Ray cluster and a registry for as long as the command runs, and nothing of them afterwards."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import httpx
import pytest

from tests.processes.answers import Answer, ask, assert_right
from tests.processes.cluster import MODEL, ROOT, started
from tests.ray.load import SHORT
from tests.servers import need

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_it_serves_and_leaves_nothing(right: dict[str, Answer], number: signal.Signals) -> None:
    need("redis-server")
    with started("--ray") as cluster:

        async def answer() -> Answer:
            async with httpx.AsyncClient(base_url=cluster.url) as client:
                return await ask(client, SHORT[0], Answer())

        assert_right(asyncio.run(answer()), right[str(SHORT[0])])
        cluster.stop(number)
        cluster.assert_nothing_left()


@pytest.mark.parametrize(
    ("flags", "words"), [(["--aggregated"], "--aggregated"), ([], "there is no redis-server on PATH")]
)
def test_what_it_cannot_do_it_says_at_once(flags: list[str], words: str) -> None:
    need("ray")
    done = subprocess.run(
        [sys.executable, "-m", "baton", "serve", str(MODEL), "--ray", "--port", "0", *flags],
        env={"PATH": "/nowhere", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (1, 2) and words in done.stderr, done
    assert len(done.stderr.splitlines()) == 1


def test_a_cluster_that_is_not_there_is_said_so_at_once() -> None:
    need("ray")
    words = ["deploy", str(ROOT / "deploy" / "cluster.yaml"), "--address", "127.0.0.1:1"]
    done = subprocess.run([sys.executable, "-m", "baton", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no Ray cluster at 127.0.0.1:1" in done.stderr, done
