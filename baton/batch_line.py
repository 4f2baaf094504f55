"""One line of a batch in OpenAI's format: what is asked, what is answered, and why a line cannot be asked at all.

{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
{"id": "batch_req_...", "custom_id": "1", "response": {"status_code": 200, "request_id": "...", "body": {...}},
 "error": null}
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass

from baton.in_process import Reply
from core.errors import BatonError
from router.validation import parse_object, refuse

URLS = ("/v1/chat/completions", "/v1/completions")
MAX_ID_CHARS = 512
TOO_MANY_REQUESTS = 429


@dataclass(frozen=True, slots=True)
class Question:
    """A line that can be asked. Whether its body is right is for the endpoint to say."""

    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """A line of the output, and whether it holds a completion."""

    text: str
    ok: bool
    tokens: int = 0


def parse_line(line: bytes, known_ids: set[str]) -> Question:
    """Adds the line's id to those known. Raises InvalidRequest."""
    fields = parse_object(line)
    custom_id = fields.text("custom_id", longest=MAX_ID_CHARS)
    if not custom_id:
        refuse("custom_id", "must name the line")
    if custom_id in known_ids:
        refuse("custom_id", "an earlier line has it too")
    known_ids.add(custom_id)
    if fields.text("method", "POST") != "POST":
        refuse("method", "must be POST")
    url, body = fields.text("url"), fields.raw("body")
    if url not in URLS:
        refuse("url", f"must be {' or '.join(URLS)}")
    if type(body) is not dict:
        refuse("body", "must be an object")
    if body.get("stream"):
        refuse("body.stream", "a batch has no streams")
    return Question(custom_id, url, json.dumps(body).encode())


def id_of(line: bytes) -> str | None:
    """The custom id of a line that cannot be asked, if it has one to be found again by."""
    try:
        return parse_object(line).text("custom_id", longest=MAX_ID_CHARS) or None
    except BatonError:
        return None


def answered(question: Question, reply: Reply) -> Answer:
    body = json.loads(reply.body)
    ok = reply.status == 200
    response = {"status_code": reply.status, "request_id": reply.headers.get("x-request-id", ""), "body": body}
    tokens = body["usage"]["completion_tokens"] if ok else 0
    return Answer(_line(question.custom_id, response, None), ok, tokens)


def not_asked(custom_id: str | None, number: int, error: BatonError) -> Answer:
    """`number` counts lines from 1."""
    return Answer(_line(custom_id, None, {"code": error.code, "message": f"line {number}: {error.message}"}), False)


def _line(custom_id: str | None, response: object, error: object) -> str:
    line = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(line, ensure_ascii=False) + "\n"
