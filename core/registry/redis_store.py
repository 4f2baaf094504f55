"""The store on Redis. Plain commands only, no scripts: its user needs no more than read, write, pub/sub, transactions.

    {prefix}:value:GROUP:NAME   SET with PX         {prefix}:names:GROUP    a set; names whose value has gone are pruned
    {prefix}:counter:NAME       SET NX PX, INCRBY   {prefix}:changes:GROUP  a channel

The braces put all keys into one slot, so that a transaction works on a cluster too. Addresses: core/registry/address.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from core.errors import ConfigError, RegistryAway
from core.registry.store import MAX_NAMES, MAX_VALUE_BYTES

T = TypeVar("T")

CONNECT_S = 0.1
ANSWER_S = 0.1
MAX_CONNECTIONS = 16
CLOSE_S = 1.0
PING_S = 5.0  # a listener that hears nothing for so long asks whether the connection is alive


class RedisStore:
    """Made by `open_store`. Safe for many tasks of one event loop.

    Each call is a task of its own: the library has been seen to swallow the cancellation of the one that calls it.
    """

    def __init__(self, redis: Any, prefix: str) -> None:
        self._redis = redis
        self._prefix = "{" + prefix + "}"
        self._calls: set[asyncio.Task[Any]] = set()

    async def put(self, group: str, name: str, value: bytes, life_s: float) -> None:
        assert len(value) <= MAX_VALUE_BYTES, len(value)
        set_value = ("SET", self._value(group, name), value, "PX", _milliseconds(life_s))
        await self._call(self._together(set_value, ("SADD", self._names(group), name)))

    async def remove(self, group: str, name: str) -> None:
        await self._call(self._together(("DEL", self._value(group, name)), ("SREM", self._names(group), name)))

    async def read(self, group: str) -> dict[str, bytes]:
        names = sorted(name.decode(errors="replace") for name in await self._call(self._members(group)))[:MAX_NAMES]
        if not names:
            return {}
        values = await self._call(self._redis.mget([self._value(group, name) for name in names]))
        gone = [name for name, value in zip(names, values, strict=True) if value is None]
        if gone:  # a name that is put again just now comes back with its next renewal
            await self._call(self._redis.srem(self._names(group), *gone))
        return {name: value for name, value in zip(names, values, strict=True) if value is not None}

    async def add(self, counter: str, amount: int, life_s: float) -> int:
        key = f"{self._prefix}:counter:{counter}"
        begin = ("SET", key, 0, "PX", _milliseconds(life_s), "NX")
        return int((await self._call(self._together(begin, ("INCRBY", key, amount))))[1])

    async def tell(self, group: str) -> None:
        await self._call(self._redis.publish(self._channel(group), b"1"))

    async def listen(self, group: str) -> AsyncIterator[None]:
        pubsub = self._redis.pubsub()
        try:
            await self._call(pubsub.subscribe(self._channel(group)))
            yield
            while True:
                message = await self._call(pubsub.get_message(timeout=PING_S))
                if message is None:
                    await self._call(pubsub.ping())
                elif message["type"] == "message":
                    yield
        finally:
            await self._call(pubsub.aclose())

    async def close(self) -> None:
        for call in self._calls:
            call.cancel()
        if self._calls:
            await asyncio.wait(self._calls, timeout=CLOSE_S)
        await self._redis.aclose()

    async def _members(self, group: str) -> set[bytes]:
        found: set[bytes] = await self._redis.smembers(self._names(group))
        return found

    async def _together(self, *commands: tuple[object, ...]) -> list[Any]:
        """All of them, or none."""
        async with self._redis.pipeline(transaction=True) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            results: list[Any] = await pipeline.execute()
        return results

    async def _call(self, call: Awaitable[T]) -> T:
        """Whatever is wrong with Redis is the same to us: it is away."""
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        task.add_done_callback(self._over)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            raise
        except (RedisError, OSError, asyncio.IncompleteReadError) as error:
            raise RegistryAway(f"Redis: {type(error).__name__}: {error}") from error

    def _over(self, call: asyncio.Task[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # seen

    def _value(self, group: str, name: str) -> str:
        return f"{self._prefix}:value:{group}:{name}"

    def _names(self, group: str) -> str:
        return f"{self._prefix}:names:{group}"

    def _channel(self, group: str) -> str:
        return f"{self._prefix}:changes:{group}"


def _milliseconds(life_s: float) -> int:
    return max(1, int(life_s * 1000))


def open_store(url: str, prefix: str = "baton") -> RedisStore:
    """Connects when it is first used. Raises ConfigError: an address that means nothing, a file that is none."""
    address = parse(url)
    _check_files(address)
    try:
        return RedisStore(_client(address), prefix)
    except (ValueError, TypeError, RedisError) as error:
        raise ConfigError(f"--registry: {type(error).__name__}: {error}") from error


def _client(address: Address) -> Any:
    options = _options(address)
    if address.kind is Kind.UNIX:
        return Redis(connection_pool=_pool(UnixDomainSocketConnection, options | {"path": address.place}))
    if address.kind is Kind.SENTINEL:
        return _behind_sentinels(address, options)
    if address.kind is Kind.CLUSTER:
        nodes = [ClusterNode(host, port) for host, port in address.hosts]
        secure = {"ssl": address.tls, **_tls(address)}
        of_pool = ("db", "retry", "driver_info")
        plain = {name: value for name, value in options.items() if name not in of_pool and not name.startswith("ssl_")}
        return RedisCluster(startup_nodes=nodes, retry=Retry(NoBackoff(), 1), **plain, **secure)
    host, port = address.hosts[0]
    kind = SSLConnection if address.tls else Connection
    return Redis(connection_pool=_pool(kind, options | {"host": host, "port": port}))
