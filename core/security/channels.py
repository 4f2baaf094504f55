"""How services connect: plainly, or both ends with certificates; and the look at who calls before anything is answered.

Files are read again when they have changed: by a server at its next handshake, by a client for its next channel.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio

from core.errors import ConfigError
from core.security.tls import WORKER_NAME, TlsFiles, may_call, role_of

log = logging.getLogger(__name__)

Options: TypeAlias = Sequence[tuple[str, Any]]
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

NAMES = "x509_subject_alternative_name"  # of the peer's certificate, in a call's context


class Channels:
    """Opens channels to workers. A worker's certificate is asked for by the name of workers, not by its address."""

    def __init__(self, files: TlsFiles | None = None) -> None:
        """None: plain channels. Raises ConfigError when a file cannot be used."""
        self._files = files
        if files is not None:
            _read(files)

    def open(self, endpoint: str, options: Options = ()) -> grpc.aio.Channel:
        if self._files is None:
            return grpc.aio.insecure_channel(endpoint, options=options)
        certificate, key, authority = _read(self._files)
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        named = (*options, ("grpc.ssl_target_name_override", WORKER_NAME))
        return grpc.aio.secure_channel(endpoint, credentials, options=named)


def make_server(options: Options, files: TlsFiles | None) -> grpc.aio.Server:
    """One that, with certificates, answers each caller only what its role may ask."""
    return grpc.aio.server(options=options, interceptors=() if files is None else (RoleCheck(),))


def add_port(server: grpc.aio.Server, address: str, files: TlsFiles | None) -> int:
    """The port that it listens on. Raises RuntimeError when it cannot, ConfigError when a file cannot be used."""
    if files is None:
        return server.add_insecure_port(address)
    current = _Current(files)
    newer: Any = current.newer  # the stubs do not know that it may return None: as before
    credentials = grpc.dynamic_ssl_server_credentials(current.configuration, newer, True)
    return server.add_secure_port(address, credentials)


class _Current:
    """The server's certificates as they lie in their files."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._stamp = _stamp(files)
        self.configuration = _configuration(files)

    def newer(self) -> grpc.ServerCertificateConfiguration | None:
        """Called at every handshake, on a thread of the library. None: as before; also when the new ones are broken."""
        try:
            stamp = _stamp(self._files)
            if stamp == self._stamp:
                return None
            configuration = _configuration(self._files)
        except ConfigError as error:
            log.error("the certificates stay as they were: %s", error.message)
            return None
        self._stamp = stamp
        log.info("read the certificates again")
        return configuration


class RoleCheck(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Ends a call with PERMISSION_DENIED before its method sees it, unless the caller's role may make it."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # a method that there is not
            return handler
        method = handler_call_details.method
        coding = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(_guarded(method, handler.stream_stream), **coding)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(_guarded(method, handler.unary_stream), **coding)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(_guarded_unary(method, handler.unary_unary), **coding)
        raise AssertionError(f"{method}: no method of ours takes a stream and answers once")


def _guarded(method: str, serve: Callable[..., Any]) -> Callable[..., Any]:
    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        await _check(method, context)
        async with aclosing(serve(request, context)) as answers:
            async for answer in answers:
                yield answer

    return guarded


def _guarded_unary(method: str, serve: Callable[..., Any]) -> Callable[..., Any]:
    async def guarded(request: Any, context: Context) -> Any:
        await _check(method, context)
        return await serve(request, context)

    return guarded


async def _check(method: str, context: Context) -> None:
    names = [name.decode("utf-8", "replace") for name in context.auth_context().get(NAMES, ())]
    role = role_of(names)
    if not may_call(role, method):
        log.warning("refused %s to %s, whose certificate is for %s: role %s", method, context.peer(), names, role)
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"role {role} may not call {method}")


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    certificate, key, authority = _read(files)
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)


def _read(files: TlsFiles) -> tuple[bytes, bytes, bytes]:
    """Certificate, key, authority. Raises ConfigError, which names the file."""
    found = []
    for path in (files.certificate, files.key, files.authority):
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        if b"-----BEGIN " not in content:
            raise ConfigError(f"{path}: no PEM file")
        found.append(content)
    return found[0], found[1], found[2]


def _stamp(files: TlsFiles) -> tuple[tuple[int, int, int], ...]:
    """Differs when a file was written or replaced. Raises ConfigError."""
    try:
        stats = [os.stat(path) for path in (files.certificate, files.key, files.authority)]
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    return tuple((found.st_ino, found.st_mtime_ns, found.st_size) for found in stats)
