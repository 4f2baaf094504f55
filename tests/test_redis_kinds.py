"""The store on every kind of Redis: TLS, users, prefixes, Sentinel, clusters, sockets; and each way to be away."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.clock import monotonic_s
from core.errors import ConfigError, RegistryAway
from core.registry.breaker import GuardedStore
from core.registry.store import Store
from tests.certificates import Authority
from tests.redis_server import RedisServer, free_port, redis_server
from tests.servers import need

SOON_S = 0.1 + 0.3  # the limit of a call, and what two busy cores add to it
FAILOVER_S = 20.0  # down-after 0.5 s, elections, and the breaker's pause; two to four seconds on a quiet machine
BATON_USER = (  # as docs/redis.md says
    "+multi +exec +set +sadd +del +srem +smembers +mget +incrby +publish +subscribe +unsubscribe +ping"
)
OF_CLUSTERS = "+cluster|slots +command"
KEYS = "~{baton}:* &{baton}:*"


@pytest.fixture(autouse=True)
def redis_is_there() -> None:
    need("redis-server")
    need("redis")


@asynccontextmanager
async def opened(url: str, prefix: str = "baton") -> AsyncIterator[Store]:
    from core.registry.redis_store import open_store

    store = open_store(url, prefix)
    try:
        yield store
    finally:
        await store.close()


async def use(store: Store) -> None:
    """Everything that a store does. Leaves nothing behind."""
    await until_works(store, 10)  # a machine at work may take too long for the first connection
    await store.put("g", "a", b"1", 5.0)
    await store.put("g", "short", b"2", 0.05)
    await asyncio.sleep(0.07)
    assert await store.read("g") == {"a": b"1"}
    assert [await store.add("c", n, 0.1) for n in (2, 3)] == [2, 5]
    async with aclosing(store.listen("g")) as changes, asyncio.timeout(5):  # type: ignore[type-var]
        await anext(changes)
        await store.tell("g")
        await anext(changes)
    await store.remove("g", "a")
    assert await store.read("g") == {}
    await asyncio.sleep(0.1)


async def use_soon(store: Store) -> None:
    """While sentinels agree on a new server, one of them may not know it yet."""
    async with asyncio.timeout(FAILOVER_S):
        while True:
            try:
                return await use(store)
            except RegistryAway:
                await asyncio.sleep(0.5)


async def until_works(store: Store, within_s: float) -> float:
    """Seconds until it takes and gives up a value again. No call may take longer than its limit meanwhile."""
    began_s = monotonic_s()
    while True:
        call_s = monotonic_s()
        try:
            await store.put("g", "probe", b"1", 5.0)
            await store.remove("g", "probe")
            return monotonic_s() - began_s
        except RegistryAway:
            assert monotonic_s() - call_s < SOON_S
            assert monotonic_s() - began_s < within_s, "it does not come back"
        await asyncio.sleep(0.02)


async def refused(call: Awaitable[object], says: str = ".") -> None:
    """It is away, and says so soon."""
    began_s = monotonic_s()
    with pytest.raises(RegistryAway, match=says):
        await call
    assert monotonic_s() - began_s < SOON_S


async def says(store: Store, what: str, within_s: float = 10.0) -> None:
    """It is away, and says why; on a busy machine the first calls may only have been too slow."""
    began_s, error = monotonic_s(), ""
    while not re.search(what, error):
        assert monotonic_s() - began_s < within_s, error
        with pytest.raises(RegistryAway) as away:
            await store.read("g")
        error = away.value.message


# --- where it is, and who may -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@contextmanager
def tls_server(folder: Path, authority: Authority, *flags: str) -> Iterator[str]:
    """Where it is: host:port."""
    cert, key = authority.issue("aggregated", file="redis")
    port = free_port()
    files = ("--tls-cert-file", str(cert), "--tls-key-file", str(key), "--tls-ca-cert-file", str(authority.certificate))
    with redis_server(folder, "--tls-port", str(port), *files, *flags):
        yield f"127.0.0.1:{port}"


async def test_over_tls_with_its_authority_and_with_a_certificate_of_ours(tmp_path: Path, authority: Authority) -> None:
    cert, key = authority.issue("router")
    with tls_server(tmp_path, authority, "--tls-auth-clients", "yes") as at:
        async with opened(f"rediss://{at}?ca={authority.certificate}&cert={cert}&key={key}") as store:
            await use(store)
        async with opened(f"rediss://{at}?ca={authority.certificate}") as store:
            await refused(store.read("g"))


async def test_another_authoritys_server_is_refused_and_the_error_says_why(
    tmp_path: Path, authority: Authority
) -> None:
    other = Authority(tmp_path / "other", "another")
    with tls_server(tmp_path, authority, "--tls-auth-clients", "no") as at:
        for url in (f"rediss://{at}?ca={other.certificate}", f"rediss://{at}"):
            async with opened(url) as store:
                await says(store, r"CERTIFICATE_VERIFY_FAILED.*\?ca= names")
        async with opened(f"redis://{at}") as store:
            await refused(store.read("g"))
        async with opened(f"rediss://{at}?ca={authority.certificate}") as store:
            await use(store)


@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_a_file_that_is_none_is_said_at_once(content: bytes | None, tmp_path: Path) -> None:
    from core.registry.redis_store import open_store

    path = tmp_path / "ca.crt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"ca\.crt"):
        open_store(f"rediss://host?ca={path}")


@contextmanager
def server_with_users(folder: Path, *rules: str) -> Iterator[RedisServer]:
    """Users u0, u1, ... with the password `secret`; nobody else."""
    users = folder / "users.acl"
    lines = [f"user u{n} on >secret {rule}" for n, rule in enumerate(rules)]
    users.write_text("\n".join(["user default off", *lines]) + "\n")
    with redis_server(folder, "--aclfile", str(users)) as server:
        yield server


def as_user(server: RedisServer, number: int, password: str = "secret") -> str:
    return f"redis://u{number}:{password}@127.0.0.1:{server.port}"


async def test_a_user_needs_these_commands_and_each_of_them(tmp_path: Path) -> None:
    commands = BATON_USER.split()
    rules = [" ".join(c for c in commands if c != without) for without in ("", *commands)]
    with server_with_users(tmp_path, *(f"{KEYS} {rule}" for rule in rules)) as server:
        async with opened(as_user(server, 0)) as store:
            await use(store)
        for number, command in enumerate(commands, 1):
            if command in ("+ping", "+unsubscribe", "+exec"):
                continue  # ping: of a listener that hears nothing; the others at the end of what is refused before
            async with opened(as_user(server, number)) as store:
                with pytest.raises(RegistryAway, match=rf"(?i)'{command[1:]}'|without {command[1:]}"):
                    await everything(store)


async def test_another_database_needs_one_more(tmp_path: Path) -> None:
    with server_with_users(tmp_path, f"{KEYS} {BATON_USER}", f"{KEYS} {BATON_USER} +select") as server:
        async with opened(as_user(server, 0) + "/1") as store:
            await refused(store.read("g"), "'select'")
        async with opened(as_user(server, 1) + "/1") as store:
            await use(store)


async def everything(store: Store) -> None:
    """As `use`, with a value that is gone."""
    await store.put("g", "short", b"2", 0.01)
    await asyncio.sleep(0.02)
    await store.read("g")
    await store.add("c", 1, 1.0)
    await store.tell("g")
    async with aclosing(store.listen("g")) as changes, asyncio.timeout(5):  # type: ignore[type-var]
        await anext(changes)
    await store.remove("g", "a")


def test_the_document_names_these_commands() -> None:
    text = (Path(__file__).parent.parent / "docs" / "redis.md").read_text(encoding="utf-8")
    assert BATON_USER in text


async def test_a_wrong_password_is_named(tmp_path: Path) -> None:
    with server_with_users(tmp_path, f"{KEYS} {BATON_USER}") as server:
        async with opened(as_user(server, 0, "guess")) as store:
            await refused(store.read("g"), "invalid username-password.*BATON_REGISTRY_PASSWORD")
        async with opened(server.url) as store:
            await refused(store.read("g"), "BATON_REGISTRY_PASSWORD")


async def test_two_prefixes_do_not_see_each_other(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        async with opened(server.url, "one") as one, opened(server.url, "two") as two:
            await one.put("g", "a", b"1", 5.0)
            assert await two.read("g") == {} and await one.add("c", 1, 5.0) == 1 == await two.add("c", 1, 5.0)
            async with aclosing(two.listen("g")) as changes:  # type: ignore[type-var]
                await anext(changes)
                await one.tell("g")
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await anext(changes)
            await two.remove("g", "a")
            assert await one.read("g") == {"a": b"1"}


async def test_over_a_unix_socket_and_in_another_database(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with redis_server(tmp_path, "--unixsocket", str(path)) as server:
        async with opened(f"unix://{path}?db=3") as store, opened(f"redis://127.0.0.1:{server.port}/3") as same:
            await use(store)
            await store.put("g", "a", b"1", 5.0)
            assert await same.read("g") == {"a": b"1"}
            async with opened(server.url) as other:
                assert await other.read("g") == {}
        async with opened(f"unix://{path}.none") as store:
            await refused(store.read("g"))


# --- several servers --------------------------------------------------------------------------------------------


@dataclass
class Sentinels:
    master: RedisServer
    replica: RedisServer
    sentinels: list[RedisServer]
    url: str


@contextmanager
def behind_sentinels(folder: Path, count: int) -> Iterator[Sentinels]:
    with ExitStack() as stack:
        master = stack.enter_context(redis_server(made(folder / "master")))
        replica = stack.enter_context(
            redis_server(made(folder / "replica"), "--replicaof", "127.0.0.1", str(master.port))
        )
        sentinels = [_sentinel(folder / f"sentinel{n}", master.port, count // 2 + 1) for n in range(count)]
        for sentinel in sentinels:
            stack.callback(sentinel.stop)
            sentinel.start()
        wait_for(lambda: "state=online" in cli(master.port, "info", "replication"))
        for sentinel in sentinels:
            wait_for(lambda port=sentinel.port: knows(port, count), 20)  # type: ignore[misc]
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
        yield Sentinels(master, replica, sentinels, f"redis+sentinel://{hosts}/main")


def _sentinel(folder: Path, master_port: int, quorum: int) -> RedisServer:
    port = free_port()
    config = made(folder) / "sentinel.conf"
    config.write_text(
        f"bind 127.0.0.1\nport {port}\ndir {folder}\nsentinel monitor main 127.0.0.1 {master_port} {quorum}\n"
        "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 3000\n"
    )
    return RedisServer(folder, "--sentinel", config=config, port=port)


def knows(port: int, count: int) -> bool:
    said = cli(port, "sentinel", "master", "main").split()
    facts = dict(zip(said[::2], said[1::2], strict=False))
    return facts.get("num-slaves") == "1" and facts.get("num-other-sentinels") == str(count - 1)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def cli(port: int, *words: str) -> str:
    done = subprocess.run(["redis-cli", "-p", str(port), *words], capture_output=True, text=True, timeout=20)
    return done.stdout


def wait_for(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, "it does not come"
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_sentinels_name_another_server_when_the_first_goes(how: str, tmp_path: Path) -> None:
    with behind_sentinels(tmp_path, 3 if how == "killed" else 1) as there:
        async with opened(there.url) as store:
            await use(store)
            guarded = GuardedStore(store, monotonic_s)
            if how == "killed":
                there.sentinels[0].signal(signal.SIGSTOP)  # two still agree, and this one must cost nobody time
                there.master.stop()
            else:
                there.master.signal(signal.SIGSTOP)
            await refused(guarded.put("g", "a", b"1", 5.0))
            await until_works(guarded, FAILOVER_S)
            await use_soon(store)
            assert "role:master" in cli(there.replica.port, "info", "replication")
            if how == "stopped":  # the old one comes back, and learns that it is a replica now
                there.master.signal(signal.SIGCONT)
                wait_for(lambda: "role:slave" in cli(there.master.port, "info", "replication"), 20)
                await until_works(guarded, FAILOVER_S)


async def test_without_any_sentinel_it_is_away_and_a_first_that_is_silent_costs_nothing(tmp_path: Path) -> None:
    with behind_sentinels(tmp_path, 1) as there, silent_port() as silent:
        at = f"127.0.0.1:{there.sentinels[0].port}"
        async with opened(f"redis+sentinel://127.0.0.1:{silent},{at}/main") as store:
            guarded = GuardedStore(store, monotonic_s)
            await guarded.put("g", "a", b"1", 5.0)
            assert await guarded.read("g") == {"a": b"1"}
        async with opened(f"redis+sentinel://{at}/other") as store:
            await refused(store.read("g"), "no sentinel knows a server that serves as 'other'")


@contextmanager
def silent_port() -> Iterator[int]:
    """Takes connections, and says nothing."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield int(listener.getsockname()[1])


@contextmanager
def cluster(folder: Path) -> Iterator[list[RedisServer]]:
    """Three masters, each with a third of the slots."""
    need("redis-cli")
    with ExitStack() as stack:
        nodes = []
        for n in range(3):
            flags = ("--cluster-enabled", "yes", "--cluster-node-timeout", "500", "--cluster-port", str(free_port()))
            at = made(folder / f"node{n}")
            nodes.append(stack.enter_context(redis_server(at, *flags, "--cluster-require-full-coverage", "no")))
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        command = ["redis-cli", "--cluster", "create", *addresses, "--cluster-yes"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        for node in nodes:
            wait_for(lambda port=node.port: "cluster_state:ok" in cli(port, "cluster", "info"), 30)  # type: ignore[misc]
        yield nodes


async def test_in_a_cluster_the_loss_of_another_node_is_nothing_and_of_our_own_is_soon_said(tmp_path: Path) -> None:
    with cluster(tmp_path) as nodes:
        url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        ours = int(cli(nodes[0].port, "cluster", "keyslot", "{baton}:x")) * 3 // 16384
        stranger = nodes[(ours + 1) % 3]
        async with opened(url) as store:
            guarded = GuardedStore(store, monotonic_s)
            await until_works(guarded, 5)
            await use(store)
            for node in nodes:
                cli(node.port, "acl", "setuser", "u", "on", ">pw", *f"{KEYS} {BATON_USER} {OF_CLUSTERS}".split())
            async with opened(url.replace("//", "//u:pw@")) as restricted:
                await use(restricted)
            stranger.stop()
            for _ in range(20):
                await until_works(guarded, 5)
            nodes[ours].stop()
            await refused(guarded.put("g", "a", b"1", 5.0))
            nodes[ours].start()
            await until_works(guarded, 15)
            await use(store)


# --- away -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def guarded_pair(server: RedisServer) -> AsyncIterator[tuple[GuardedStore, Store]]:
    """With a limit, and without: for a look that may take longer."""
    async with opened(server.url) as store, opened(server.url) as plain:
        guarded = GuardedStore(store, monotonic_s)
        await guarded.put("g", "before", b"1", 60.0)
        yield guarded, plain


async def test_a_server_that_hangs_costs_each_call_its_limit_and_then_nothing(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        async with guarded_pair(server) as (guarded, _):
            server.signal(signal.SIGSTOP)
            for _ in range(3):
                await refused(guarded.read("g"))
            assert guarded.is_away
            began_s = monotonic_s()
            for _ in range(100):
                await refused(guarded.read("g"), "left alone")
            assert monotonic_s() - began_s < 0.2
            server.signal(signal.SIGCONT)
            await until_works(guarded, 5)
            assert (await guarded.read("g"))["before"] == b"1"


class SlowRoad:
    """Passes bytes on to a port, each piece `delay_s` after it came."""

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> int:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = server
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.create_task(self._pass_on(source, sink))
            self._tasks.add(task)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while piece := await source.read(65536):
                await asyncio.sleep(self.delay_s)
                sink.write(piece)
                await sink.drain()
        except ConnectionError:
            pass  # the other side has left
        finally:
            sink.close()


async def test_a_slow_server_is_used_until_it_is_slower_than_the_limit(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        road = SlowRoad(server.port)
        port = await road.open()
        try:
            async with opened(f"redis://127.0.0.1:{port}") as store:
                guarded = GuardedStore(store, monotonic_s)
                road.delay_s = 0.01
                for n in range(5):
                    await guarded.put("g", "a", b"%d" % n, 60.0)
                road.delay_s = 0.3
                for _ in range(10):
                    await refused(guarded.put("g", "a", b"late", 60.0))
                assert guarded.is_away
                road.delay_s = 0.0
                await until_works(guarded, 5)
                for n in range(20):  # what came late is never taken for the answer to another question
                    await guarded.put("g", "a", b"%d" % n, 60.0)
                    assert (await guarded.read("g"))["a"] == b"%d" % n
        finally:
            await road.close()


async def test_a_server_that_comes_back_empty_or_old_is_used_as_it_is(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--dbfilename", "dump.rdb") as server:
        async with guarded_pair(server) as (guarded, plain):
            assert "OK" in cli(server.port, "save")
            shutil.copy(tmp_path / "dump.rdb", tmp_path / "old.rdb")
            (tmp_path / "dump.rdb").unlink()
            server.stop()
            await refused(guarded.read("g"))
            server.start()
            await until_works(guarded, 5)
            assert await guarded.read("g") == {}, "empty"
            await guarded.put("g", "before", b"newer", 60.0)
            server.stop()
            shutil.copy(tmp_path / "old.rdb", tmp_path / "dump.rdb")
            server.start()
            await until_works(guarded, 5)
            assert await plain.read("g") == {"before": b"1"}, "an old copy, until its owner writes again"


async def test_a_replica_that_takes_no_writes_is_away_for_writers(tmp_path: Path) -> None:
    with redis_server(made(tmp_path / "a")) as master:
        flags = ("--replicaof", "127.0.0.1", str(master.port))
        with redis_server(made(tmp_path / "b"), *flags) as replica:
            wait_for(lambda: "state=online" in cli(master.port, "info", "replication"))
            async with opened(master.url) as writer, opened(replica.url) as store:
                await writer.put("g", "a", b"1", 60.0)
                await asyncio.sleep(0.2)
                assert await store.read("g") == {"a": b"1"}
                await refused(store.put("g", "a", b"2", 60.0), "replica")
                assert await store.read("g") == {"a": b"1"}


async def test_a_full_server_is_away_for_writers_and_says_that_it_is_full(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--maxmemory-policy", "noeviction") as server:
        async with guarded_pair(server) as (guarded, plain):
            cli(server.port, "config", "set", "maxmemory", "1")
            await refused(guarded.put("g", "a", b"1", 60.0), "full")
            assert await plain.read("g") == {"before": b"1"}
            cli(server.port, "config", "set", "maxmemory", "0")
            await until_works(guarded, 5)
