"""How `baton status` and `baton top` get the view of a cluster: asked of a router, checked, and typed again."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import fields
from typing import Any, TypeVar

import aiohttp

from baton import endpoint
from baton.endpoint import Endpoint
from core.errors import ConfigError
from router.cluster_view import VERSION, ClusterView, PairView, RegistryView, RouterView, TierView, WorkerView
from router.recent import Spread

T = TypeVar("T")

URL = "http://localhost:8000"
ANSWER_S = 10.0
KINDS = {"str": str, "int": int, "float": (int, float), "bool": bool}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", default=URL, metavar="URL", help=f"address of any router ({URL})")
    parser.add_argument("--api-key", help="bearer token, if something before the router asks for one")


def router_of(args: argparse.Namespace) -> Endpoint:
    """`host:port` will do. Raises ConfigError."""
    if "://" not in args.url:
        args.url = f"http://{args.url}"
    return endpoint.from_args(args)


async def ask(session: aiohttp.ClientSession, router: Endpoint) -> ClusterView:
    """Raises ConfigError when nobody is there, or somebody who tells of no cluster."""
    try:
        async with asyncio.timeout(ANSWER_S), session.get(f"{router.base_url}/cluster") as response:
            body = await response.read()
            status = response.status
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ConfigError(f"no router at {router.base_url}: {endpoint.error_text(error)}") from error
    if status == 404:
        raise ConfigError(f"{router.base_url} tells of no cluster: is it a Baton router, and of this version?")
    if status != 200:
        raise ConfigError(f"{router.base_url} answers {status}: {endpoint.error_message(body)}")
    return read(body)


def read(body: bytes) -> ClusterView:
    """Fields that this version does not know are left out. Raises ConfigError."""
    try:
        plain = _printable(json.loads(body))
        version = plain["version"]
        if version != VERSION:
            raise ConfigError(f"the router tells version {version} of the view, and this command reads {VERSION}")
        return _view(plain)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"the router's view of its cluster cannot be read: {error}") from error


def _printable(value: Any) -> Any:
    """Control characters in what others have named would reach the terminal."""
    if isinstance(value, str):
        return value if value.isprintable() else "".join(one if one.isprintable() else "\ufffd" for one in value)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(item) for name, item in value.items()}
    return value


def _view(plain: dict[str, Any]) -> ClusterView:
    registry = plain["registry"]
    return ClusterView(
        model=str(plain["model"]),
        baton_version=str(plain["baton_version"]),
        routers=tuple(_made(RouterView, one) for one in plain["routers"]),
        tiers=tuple(_made(TierView, one) for one in plain["tiers"]),
        workers=tuple(_made(WorkerView, one) for one in plain["workers"]),
        handoffs=tuple(_made(PairView, one) for one in plain["handoffs"]),
        first_token=_spread(plain["first_token"]),
        token_gap=_spread(plain["token_gap"]),
        registry=None if registry is None else _made(RegistryView, registry),
    )


def _spread(plain: dict[str, Any]) -> Spread:
    return _made(Spread, plain | {"history_p90_s": tuple(plain["history_p90_s"])})


def _made(kind: type[T], plain: dict[str, Any]) -> T:
    """Raises TypeError when a field is missing or of another kind."""
    known = {item.name: str(item.type) for item in fields(kind)}  # type: ignore[arg-type]
    for name, expected in known.items():
        if name in plain and expected in KINDS and not isinstance(plain[name], KINDS[expected]):  # type: ignore[arg-type]
            raise TypeError(f"{kind.__name__}.{name} is {plain[name]!r}")
    return kind(**{name: value for name, value in plain.items() if name in known})
