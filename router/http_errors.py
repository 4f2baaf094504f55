"""What each error becomes over HTTP: status, headers, and a body in OpenAI's shape. The one place that decides it."""

from __future__ import annotations

import math

from core.errors import BatonError, Cancelled, Overloaded, PoisonRequest, RequestError, WorkerLost
from router.reply import json_text

MAX_MESSAGE_CHARS = 1000
DEFAULT_RETRY_AFTER_S = 1.0
CLOSING_STATUS = (408, 413)  # the body was not read to its end: the connection cannot be used again


def error_body(error: BatonError) -> str:
    """{"error": {...}}, at most 2 KiB."""
    return shaped(_message(error), error.error_type, error.param, error.code)


def shaped(message: str, kind: str, param: str | None, code: str | None) -> str:
    return json_text({"error": {"message": message, "type": kind, "param": param, "code": code}})


def _message(error: BatonError) -> str:
    """What went wrong inside is for the log: a client gets the code, and a fixed text."""
    if isinstance(error, RequestError | Overloaded | Cancelled) or error.http_status == 504:
        return error.message[:MAX_MESSAGE_CHARS]
    return f"The server could not finish this request ({error.code})."


def error_headers(error: BatonError) -> list[tuple[bytes, bytes]]:
    headers = []
    if isinstance(error, Overloaded | WorkerLost):
        wait_s = error.retry_after_s if error.retry_after_s is not None else DEFAULT_RETRY_AFTER_S
        headers.append((b"retry-after", str(max(1, math.ceil(wait_s))).encode()))
    if isinstance(error, PoisonRequest):  # OpenAI's clients would retry a 500
        headers.append((b"x-should-retry", b"false"))
    if error.http_status in CLOSING_STATUS:
        headers.append((b"connection", b"close"))
    return headers
