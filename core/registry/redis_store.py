"""The store on Redis. Plain commands only, no scripts: its user needs no more than read, write, pub/sub, transactions.

    {prefix}:value:GROUP:NAME   SET with PX         {prefix}:names:GROUP    a set; names whose value has gone are pruned
    {prefix}:counter:NAME       SET NX PX, INCRBY   {prefix}:changes:GROUP  a channel

The braces put all keys into one slot, so that a transaction works on a cluster too. Addresses:
core/registry/address.py.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from core.errors import ConfigError, RegistryAway
from core.registry.address import Address, Kind, parse
from core.registry.store import MAX_NAMES, MAX_VALUE_BYTES

T = TypeVar("T")

CONNECT_S = 0.1
ANSWER_S = 0.1
MAX_CONNECTIONS = 16
CLOSE_S = 1.0
PING_S = 5.0  # a listener that hears nothing for so long asks whether the connection is alive

HINTS = (  # part of Redis's own words, and what it comes from
    ("CERTIFICATE_VERIFY_FAILED", "the server's certificate is not one of the authority that ?ca= names"),
    ("invalid username-password", "the user or the password in --registry or BATON_REGISTRY_PASSWORD is wrong"),
    ("Authentication required", "this server asks for a password: set BATON_REGISTRY_PASSWORD"),
    ("EXEC without MULTI", "the user may not use MULTI: docs/redis.md lists what it needs"),
    ("no permissions", "docs/redis.md lists what the user needs"),
    ("read only", "this server is a replica: name the one that takes writes, or the sentinels"),
    ("maxmemory", "this server is full: give it more memory, or a maxmemory-policy that evicts"),
)


class RedisStore:
    """Made by `open_store`. Safe for many tasks of one event loop.

    Each call is a task of its own: the library has been seen to swallow the cancellation of the one that calls it.
    """

    def __init__(self, redis: Any, prefix: str, others: Sequence[Any] = ()) -> None:
        """`others`: what else is to be closed."""
        self._redis = redis
        self._others = others
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
            while True:
                message = await self._call(pubsub.get_message(timeout=PING_S))
                if message is None:
                    await self._call(pubsub.ping())
                elif message["type"] in ("subscribe", "message"):  # it has begun, also anew; or there is news
                    yield
        finally:
            await self._call(pubsub.aclose())

    async def close(self) -> None:
        for call in self._calls:
            call.cancel()
        if self._calls:
            await asyncio.wait(self._calls, timeout=CLOSE_S)
        for client in (self._redis, *self._others):
            await client.aclose()

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
        except (RedisError, OSError, asyncio.IncompleteReadError, RuntimeError) as error:  # the last: uvloop's
            raise RegistryAway(f"Redis: {type(error).__name__}: {error}{_hint(str(error))}") from error

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


def _hint(text: str) -> str:
    """What to do about the errors that people make."""
    return next((f" ({hint})" for part, hint in HINTS if part in text), "")


def _milliseconds(life_s: float) -> int:
    return max(1, int(life_s * 1000))


def open_store(url: str, prefix: str = "baton") -> RedisStore:
    """Connects when it is first used. Raises ConfigError: an address that means nothing, a file that is none."""
    address = parse(url)
    _check_files(address)
    try:
        if address.kind is Kind.SENTINEL:
            sentinels = _sentinels(address)
            return RedisStore(sentinels.master_for(address.place, **_of_one(address)), prefix, sentinels.sentinels)
        return RedisStore(_client(address), prefix)
    except (ValueError, TypeError, RedisError) as error:
        raise ConfigError(f"--registry: {type(error).__name__}: {error}") from error


def _client(address: Address) -> Any:
    if address.kind is Kind.CLUSTER:
        nodes = [ClusterNode(host, port) for host, port in address.hosts]
        return RedisCluster(startup_nodes=nodes, retry=Retry(NoBackoff(), 1), **_options(address))
    one = _of_one(address) | {"max_connections": MAX_CONNECTIONS}
    if address.kind is Kind.UNIX:
        return Redis(unix_socket_path=address.place, **one)
    host, port = address.hosts[0]
    return Redis(host=host, port=port, **one)


def _of_one(address: Address) -> dict[str, Any]:
    return _options(address) | {"retry": Retry(NoBackoff(), 0), "db": address.db}


def _options(address: Address) -> dict[str, Any]:
    """Of every connection. The older protocol and no name of the library: a connection begins with fewer questions."""
    options: dict[str, Any] = {
        "socket_timeout": ANSWER_S,
        "socket_connect_timeout": CONNECT_S,
        "protocol": 2,
        "driver_info": None,
        "username": address.user or None,
        "password": address.password or None,
    }
    if address.tls:
        files = {"ssl_ca_certs": address.ca, "ssl_certfile": address.cert, "ssl_keyfile": address.key}
        options |= {"ssl": True, "ssl_check_hostname": True, **{name: path for name, path in files.items() if path}}
    return options


class _Sentinels(Sentinel):
    """Asks all at once: one that does not answer would cost each call its time."""

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        asked = [asyncio.ensure_future(sentinel.sentinel_masters()) for sentinel in self.sentinels]
        try:
            for answer in asyncio.as_completed(asked):
                try:
                    answered: Any = await answer
                    state = answered.get(service_name)
                except RedisError:
                    continue
                if state and self.check_master_state(state, service_name):
                    return str(state["ip"]), int(state["port"])
        finally:
            for question in asked:
                question.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        raise MasterNotFoundError(f"no sentinel knows a server that serves as {service_name!r}")


def _sentinels(address: Address) -> _Sentinels:
    options = _of_one(address) | {"db": 0}
    if not address.sentinel_auth:
        options |= {"username": None, "password": None}
    return _Sentinels(list(address.hosts), sentinel_kwargs=options)  # type: ignore[no-untyped-call]


def _check_files(address: Address) -> None:
    """Raises ConfigError, which names the file."""
    named = [path for path in (address.ca, address.cert, address.key) if path]
    for path in named:
        if not os.access(path, os.R_OK):
            raise ConfigError(f"--registry: {path} cannot be read")
    try:
        context = ssl.create_default_context(cafile=address.ca or None)
        if address.cert:
            context.load_cert_chain(address.cert, address.key)
    except OSError as error:
        raise ConfigError(f"--registry: {', '.join(named)}: {error}") from error
