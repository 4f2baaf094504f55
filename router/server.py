"""The HTTP server that the application runs in: how much and how long it listens before a request is one.

uvicorn bounds neither the size of headers nor the time they take. Here a connection that sends too much or too slowly
is answered and closed, and one whose client does not read can be cut.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from router.connection import ABORT
from router.http_errors import shaped

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16 * 2**10
HEADER_TIMEOUT_S = 10.0
LINGER_S = 1.0
KEEP_ALIVE_S = 75.0  # longer than the idle time of common proxies: they close first, and no request is lost
CLOSE = (b"connection", b"close")
REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


class BoundedHttp(HttpToolsProtocol):
    """HTTP/1.1 with bounded headers, and errors in the same shape as everywhere else."""

    _header_bytes = 0
    _in_headers = True  # from the first byte of a request to the end of its headers
    _headers_due: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if not self._in_headers or self._refused:
            return
        self._header_bytes += len(data)
        if self._header_bytes > MAX_HEADER_BYTES:
            self._refuse(431, f"the headers are larger than {MAX_HEADER_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: {"call": self.transport.abort}}
        if not self._in_headers:
            self._header_bytes = 0
            self._expect_headers()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._stop_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _expect_headers(self) -> None:
        self._in_headers = True
        self._stop_timer()
        self._headers_due = self.loop.call_later(HEADER_TIMEOUT_S, self._headers_late)

    def _stop_timer(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _headers_late(self) -> None:
        """A connection that never said anything is closed without a word, like an idle one."""
        if self._header_bytes:
            self._refuse(408, f"the headers did not arrive within {HEADER_TIMEOUT_S:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        body = shaped(message, "invalid_request_error", None, "bad_request").encode()
        head = (
            f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self._refused = True
        self._stop_timer()
        self.transport.write(head.encode() + body)
        self.transport.write_eof()
        # Closing while the client still sends would reset the connection before it has read the reply.
        self._headers_due = self.loop.call_later(LINGER_S, self.transport.abort)


class HttpServer(uvicorn.Server):
    """Signals belong to the process that runs this, not to a library: `drain`, or `should_exit = True`, stops it."""

    draining = False

    def drain(self, listen_s: float) -> None:
        """Listen for so long yet, since balancers hear of it late, and let every client go with its answer; then stop.

        A second call stops at once.
        """
        if self.draining:
            self.should_exit = self.force_exit = True
            return
        self.draining = True
        self.config.encoded_headers.append(CLOSE)
        self.server_state.default_headers = [*self.server_state.default_headers, CLOSE]
        asyncio.get_running_loop().call_later(listen_s, setattr, self, "should_exit", True)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def http_server(app: ASGIApp, host: str = "127.0.0.1", port: int = 0, drain_s: int = 3) -> HttpServer:
    """Run it with `await server.serve(sockets)`. It has `drain_s` to finish its streams when told to stop."""
    return HttpServer(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=BoundedHttp,
            ws="none",
            loop="uvloop",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(KEEP_ALIVE_S),
            timeout_graceful_shutdown=drain_s,
            backlog=2048,
        )
    )
