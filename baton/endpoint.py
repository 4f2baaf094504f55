"""How the client tools reach an OpenAI server: its address, its key, its model, and what its errors say."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from core.errors import ConfigError

CONNECT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, as the flags name it."""

    base_url: str  # without /v1
    api_key: str

    def url(self, path: str) -> str:
        return f"{self.base_url}/v1/{path}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every client tool has."""
    parser.add_argument("--url", default="http://localhost:8000", help="address of the server")
    parser.add_argument("--model", help="model to ask for (default: the first that the server lists)")
    parser.add_argument("--api-key", help="bearer token (default: the environment's OPENAI_API_KEY)")


def from_args(args: argparse.Namespace) -> Endpoint:
    """Raises ConfigError when --url is not an address."""
    url: str = args.url
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url must start with http:// or https://, got {url!r}", param="url")
    api_key = args.api_key if args.api_key is not None else os.environ.get("OPENAI_API_KEY", "")
    return Endpoint(url.rstrip("/").removesuffix("/v1"), api_key)


@asynccontextmanager
async def open_session(endpoint: Endpoint, *, idle_s: float) -> AsyncIterator[aiohttp.ClientSession]:
    """Connections to the server, as many as the caller uses at once; one that is silent for `idle_s` is given up."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=idle_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=endpoint.headers) as session:
        yield session


async def served_model(session: aiohttp.ClientSession, endpoint: Endpoint) -> str:
    """The first model that the server lists. Raises ConfigError when there is no such server."""
    try:
        async with session.get(endpoint.url("models")) as response:
            body = await response.read()
            if response.status != 200:
                raise ConfigError(f"{endpoint.base_url} answers {response.status}: {error_message(body)}")
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ConfigError(f"no server at {endpoint.base_url}: {error_text(error)}") from error
    try:
        name = json.loads(body)["data"][0]["id"]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{endpoint.base_url} lists no model: is it an OpenAI server?") from error
    return str(name)


def error_text(error: Exception) -> str:
    """What went wrong with a connection. Some exceptions, time-outs among them, say nothing but their name."""
    return str(error) or type(error).__name__


def error_message(body: bytes) -> str:
    """What an OpenAI error body says; the start of the body when it is something else."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError):
        return body[:200].decode(errors="replace").strip() or "no reason given"
