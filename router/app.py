"""The router as an ASGI application: which path goes where, and what else than a reply can come back."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from core.clock import Clock, monotonic_s
from core.errors import BatonError
from router.admission import Admission, Parts
from router.cluster_view import ClusterView
from router.connection import Connection
from router.generation import Generator
from router.handler import Handler, random_id, random_seed
from router.http_errors import error_body, error_headers, shaped
from router.limits import Limits, ServedModel
from router.metrics import RouterMetrics
from router.openai_chat import ChatShape
from router.openai_completions import CompletionShape
from router.path_survey import PathSurvey
from router.prompts import Prompts
from router.reply import Shape, json_text
from router.service_routes import Cluster, Models, Operations, Paths, Tokens
from router.tokenizer import ModelTokenizer
from router.validation import Fields, parse_object

logger = logging.getLogger(__name__)

CLIENT_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


async def always_healthy() -> None: ...


async def no_workers() -> Sequence[str]:
    return ()


def nobody_surveyed() -> PathSurvey:
    return PathSurvey(tuple)


async def nothing_seen() -> ClusterView:
    return ClusterView("", "", (), (), (), ())


@dataclass(frozen=True, slots=True)
class Front:
    """What the HTTP front is given. `health` raises a BatonError when the service cannot answer."""

    model: ServedModel
    tokenizer: ModelTokenizer
    generator: Generator
    metrics: RouterMetrics
    limits: Limits = field(default_factory=Limits)
    parts: Parts = field(default_factory=Parts)  # of the limits, where routers share them
    health: Callable[[], Awaitable[None]] = always_healthy
    worker_metrics: Callable[[], Awaitable[Sequence[str]]] = no_workers
    survey: PathSurvey = field(default_factory=nobody_surveyed)
    cluster: Callable[[], Awaitable[ClusterView]] = nothing_seen
    version: str = "0"
    clock: Clock = monotonic_s
    wall_clock: Callable[[], float] = time.time
    new_id: Callable[[], str] = random_id
    new_seed: Callable[[], int] = random_seed


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An ASGI application for one of the two generating endpoints: no framework between it and the socket."""

    shape: Shape
    handler: Handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self.handler
        request_id = handler.new_id()
        connection = Connection(scope, receive, send, handler.limits, handler.clock)
        connection.add_header(b"x-request-id", _shown_id(connection.header(b"x-request-id"), request_id))
        await handler.serve(self.shape, connection, request_id)


@dataclass(frozen=True, slots=True)
class JsonEndpoint:
    """An ASGI application that answers one JSON object with another, within the same bounds."""

    answer: Callable[[Fields], Awaitable[object]]
    limits: Limits
    clock: Clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = Connection(scope, receive, send, self.limits, self.clock)
        try:
            await connection.reply(200, json_text(await self.answer(parse_object(await connection.body()))))
        except BatonError as error:
            await connection.fail(error)


def _shown_id(client_id: bytes | None, request_id: str) -> bytes:
    """A client's own id comes back to it, and is logged beside ours; it never names anything here."""
    if client_id is None or not CLIENT_ID.fullmatch(client_id):
        return request_id.encode()
    logger.info("request %s is the client's %s", request_id, client_id.decode())
    return client_id


def build_app(front: Front) -> Starlette:
    """The application. Raises nothing: what it is given has been checked."""
    admission = Admission(front.limits, front.clock, front.parts)
    front.metrics.watch(admission)
    prompts = Prompts(front.tokenizer, front.model)
    handler = Handler(
        model=front.model,
        limits=front.limits,
        prompts=prompts,
        generator=front.generator,
        admission=admission,
        metrics=front.metrics,
        clock=front.clock,
        wall_clock=front.wall_clock,
        new_id=front.new_id,
        new_seed=front.new_seed,
    )
    app = Starlette(
        routes=[*_generating_routes(handler), *_service_routes(front, prompts)],
        exception_handlers={HTTPException: _http_error, BatonError: _baton_error, Exception: _internal_error},
    )
    app.router.redirect_slashes = False
    return app


def _generating_routes(handler: Handler) -> list[Route]:
    chat, completion = Endpoint(ChatShape(), handler), Endpoint(CompletionShape(), handler)
    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
    ]


def _service_routes(front: Front, prompts: Prompts) -> list[Route]:
    models = Models(front.model)
    operations = Operations(front.health, front.worker_metrics, front.metrics, front.version, front.limits)
    paths = Paths(front.survey)
    tokens = Tokens(front.model, front.limits, prompts)
    tokenize = JsonEndpoint(tokens.tokenize, front.limits, front.clock)
    detokenize = JsonEndpoint(tokens.detokenize, front.limits, front.clock)
    return [
        Route("/v1/models", models.every),
        Route("/v1/models/{name:path}", models.one),
        Route("/health", operations.get_health),
        Route("/metrics", operations.get_metrics),
        Route("/version", operations.get_version),
        Route("/cluster", Cluster(front.cluster).get),
        Route("/paths", paths.get_known),
        Route("/paths/probe", paths.probe, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


def _error_response(status: int, body: str, headers: dict[str, str]) -> Response:
    return Response(body, status, headers, media_type="application/json")


async def _http_error(_: Request, error: Exception) -> Response:
    """404 and 405 of the routing, in the same shape as every other error."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    body = shaped(error.detail, "invalid_request_error", None, code)
    return _error_response(error.status_code, body, dict(error.headers or {}))


async def _baton_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, BatonError)
    headers = {name.decode(): value.decode() for name, value in error_headers(error)}
    return _error_response(error.http_status, error_body(error), headers)


async def _internal_error(_: Request, error: Exception) -> Response:
    return _error_response(500, error_body(BatonError(str(error))), {})
