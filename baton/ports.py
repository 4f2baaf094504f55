"""The ports of processes: taken, or tried, before anything is loaded, so that one in use is said at once."""

from __future__ import annotations

import errno
import socket

from core.errors import ConfigError, PortInUse

WILDCARDS = ("", "*", "0.0.0.0", "::")  # noqa: S104


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[host]:port". Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise ConfigError(f"{address!r} is not an address: unix:/path or host:port is needed")
    return host.removeprefix("[").removesuffix("]"), int(port)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises PortInUse or ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} on {host} is in use: choose another with --port") from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    listener.setblocking(False)
    return listener
