"""The connection: bodies and headers within bounds, clients that leave or do not read, and the endpoints around
generation."""

import asyncio
import json
import re
import socket
import time
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from router_front import (
    CONTEXT,
    HELLO,
    MODEL,
    chat,
    completion,
    error_of,
    events,
    front,
    in_process,
    on_socket,
    say,
    tiny_tokenizer,
    until,
)

import router.server
from core.errors import NoCapacity, WorkerLost
from router.limits import Limits
from router.reply import json_text

TOKENIZER = tiny_tokenizer()
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def raw_request(body: bytes, path: str = CHAT, length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


async def exchange(port: int, request: bytes) -> bytes:
    """Sends, and reads to the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer


# The shape of a stream


async def test_a_stream_carries_each_choice_once_and_ends() -> None:
    async with in_process(front(TOKENIZER, say(TOKENIZER, HELLO))) as client:
        body = chat(stream=True, n=2, stream_options={"include_usage": True, "continuous_usage_stats": True})
        response = await client.post(CHAT, json=body)
    stream = events(response.text)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert stream.done and stream.text == HELLO == "".join(stream.texts(1))
    assert (stream.finish(0), stream.finish(1)) == ("stop", "stop")
    running = [chunk["usage"]["completion_tokens"] for chunk in stream.chunks]
    assert running == sorted(running) and running[-1] == running[-2]
    assert stream.chunks[-1]["choices"] == []


async def test_held_back_text_makes_no_event() -> None:
    async with in_process(front(TOKENIZER, say(TOKENIZER, "😀x"))) as client:
        stream = events((await client.post(CHAT, json=chat(stream=True))).text)
    assert stream.texts(0) == ["", "😀", "x", ""]  # the first event comes with the first token, whatever it says


@pytest.mark.parametrize("text", ['"quoted" \\ back', "line\nfeed\r\n\t", "\u2028\u0000\x7f", "data: [DONE]\n\n"])
async def test_any_text_fits_into_a_frame(text: str) -> None:
    async with in_process(front(TOKENIZER, say(TOKENIZER, text))) as client:
        assert events((await client.post(COMPLETIONS, json=completion(stream=True, max_tokens=99))).text).text == text
        assert (await client.post(COMPLETIONS, json=completion(max_tokens=99))).json()["choices"][0]["text"] == text


async def test_an_end_id_is_text_only_on_demand() -> None:
    async with in_process(front(TOKENIZER, say(TOKENIZER, "x"))) as client:
        body = completion(include_stop_str_in_output=True, skip_special_tokens=False)
        assert (await client.post(COMPLETIONS, json=body)).json()["choices"][0]["text"] == "x<|im_end|>"


async def test_the_seed_is_always_set() -> None:
    generator = say(TOKENIZER, "x")
    async with in_process(front(TOKENIZER, generator)) as client:
        for fields in ({}, {"seed": -4}, {"seed": None}):
            await client.post(CHAT, json=chat(**fields))
    assert [request.params.seed for request in generator.requests] == [1000, -4, 1002]


async def test_the_salt_separates_tenants_and_names_nothing() -> None:
    generator = say(TOKENIZER, "x")
    async with in_process(front(TOKENIZER, generator)) as client:
        for salt in (None, "a", "a", "b"):
            await client.post(CHAT, json=chat(cache_salt=salt))
    none, first, again, other = [request.salt for request in generator.requests]
    assert none == b"" and first == again != other and first != b"a"


# Who leaves, and who does not read


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_the_generation(stream: bool) -> None:
    generator = say(TOKENIZER, HELLO, endless=True, delay_s=0.001)
    served = front(TOKENIZER, generator)
    async with on_socket(served) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw_request(json.dumps(chat(stream=stream)).encode()))
        await until(lambda: generator.running == 1)
        writer.close()
        await until(lambda: generator.running == 0)
    assert generator.cancelled == 1
    assert 'baton:requests_total{outcome="cancelled"} 1.0' in served.metrics.text()
    assert "baton:router_inflight_requests 0.0" in served.metrics.text()
    assert "baton:router_queued_prompt_tokens 0.0" in served.metrics.text()


async def test_leaving_cancels_every_prompt_of_a_call() -> None:
    generator = say(TOKENIZER, HELLO, endless=True, delay_s=0.001)
    async with on_socket(front(TOKENIZER, generator)) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw_request(json.dumps(completion(["a", "b", "c"], max_tokens=4000)).encode(), COMPLETIONS))
        await until(lambda: generator.running == 3)
        writer.close()
        await until(lambda: generator.running == 0)
    assert generator.cancelled == 3


async def deaf_client(port: int, body: dict[str, Any]) -> socket.socket:
    """Sends a request, and reads nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", port))
    await loop.sock_sendall(connection, raw_request(json.dumps(body).encode()))
    return connection


async def read_all(connection: socket.socket) -> bytes:
    """What is still to be read after the server has cut the connection."""
    parts = []
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(20):
        while part := await loop.sock_recv(connection, 1 << 20):
            parts.append(part)
    connection.close()
    return b"".join(parts)


def ended(metrics: str) -> list[str]:
    """The outcomes that have been counted."""
    return re.findall(r'baton:requests_total\{outcome="(\w+)"\} [1-9]', metrics)


async def test_a_client_that_does_not_read_is_cut() -> None:
    generator = say(TOKENIZER, "some words " * 50, endless=True)
    served = front(TOKENIZER, generator, Limits(send_timeout_s=0.3))
    async with on_socket(served) as port:
        connection = await deaf_client(port, chat(stream=True, n=8))
        await until(lambda: generator.running == 1)
        await until(lambda: generator.running == 0, seconds=20)
        assert generator.cancelled == 1
        text = await read_all(connection)
    assert text.startswith(b"HTTP/1.1 200") and not text.endswith(b"0\r\n\r\n"), "a cut stream looks whole"


@pytest.mark.parametrize("fails_at", [None, 3000])
async def test_neither_a_large_reply_nor_an_error_waits_for_ever(fails_at: int | None) -> None:
    generator = say(TOKENIZER, "some words " * 3000)
    if fails_at is not None:
        generator.fails, generator.fails_at = NoCapacity("x"), fails_at
    served = front(TOKENIZER, generator, Limits(send_timeout_s=0.3))
    async with on_socket(served) as port:
        fields: dict[str, Any] = {"stream": True} if fails_at else {"logprobs": True, "top_logprobs": 3}
        connection = await deaf_client(port, chat(n=8, max_tokens=3500, **fields))
        await until(lambda: ended(served.metrics.text()), seconds=30)
        text = await read_all(connection)
    assert "ok" not in ended(served.metrics.text())
    assert text.startswith(b"HTTP/1.1 200") and not text.endswith((b"0\r\n\r\n", b"}"))


async def test_a_slow_reader_that_reads_gets_everything() -> None:
    generator = say(TOKENIZER, "some words " * 3000)
    async with on_socket(front(TOKENIZER, generator, Limits(send_timeout_s=0.5))) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
        body = json.dumps(chat(stream=True, max_tokens=4000)).encode()
        writer.write(raw_request(body).replace(b"Host", b"Connection: close\r\nHost"))
        answer = b""
        while part := await reader.read(1 << 14):
            answer += part
            await asyncio.sleep(0.005)
        writer.close()
    assert b"data: [DONE]" in answer


@pytest.mark.parametrize("stream", [True, False])
async def test_a_server_that_stops_tells_the_requests_it_could_not_finish(stream: bool) -> None:
    generator = say(TOKENIZER, HELLO, endless=True, delay_s=0.001)
    async with on_socket(front(TOKENIZER, generator)) as port:
        body = json.dumps(chat(stream=stream)).encode()
        answer = asyncio.create_task(exchange(port, raw_request(body)))
        await until(lambda: generator.running == 1)
    assert generator.cancelled == 1
    text = await answer
    assert text.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 503")
    assert b'"code":"no_capacity"' in text and b"[DONE]" not in text


# Bodies and headers


@pytest.mark.parametrize("size", [5 * 2**20, 10 * 2**20])
@pytest.mark.parametrize("chunked", [True, False])
async def test_a_large_body_is_refused_without_reading_it_all(size: int, chunked: bool) -> None:
    generator = say(TOKENIZER, HELLO)
    content = b'{"prompt": "' + b"x" * size + b'"}'

    async def parts() -> Any:
        for start in range(0, len(content), 1 << 16):
            yield content[start : start + (1 << 16)]

    async with (
        on_socket(front(TOKENIZER, generator)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        for path in (CHAT, COMPLETIONS, "/tokenize"):
            response = await client.post(path, content=parts() if chunked else content)
            assert response.status_code == 413
            assert error_of(response)["code"] == "body_too_large"
        assert (await client.post(CHAT, json=chat())).status_code == 200
    assert len(generator.requests) == 1


async def test_a_declared_length_is_enough_to_refuse() -> None:
    async with on_socket(front(TOKENIZER, say(TOKENIZER, HELLO), Limits(body_timeout_s=1.0))) as port:
        started = time.monotonic()
        answer = await exchange(port, raw_request(b"{}", length=10**12))
        assert answer.startswith(b"HTTP/1.1 413") and b"body_too_large" in answer
        assert time.monotonic() - started < 5


async def test_a_slow_body_is_refused() -> None:
    async with on_socket(front(TOKENIZER, say(TOKENIZER, HELLO), Limits(body_timeout_s=0.2))) as port:
        answer = await exchange(port, raw_request(b'{"model":', length=100))
        assert answer.startswith(b"HTTP/1.1 408") and b"body_too_slow" in answer


async def test_compressed_bodies_are_refused() -> None:
    async with in_process(front(TOKENIZER, say(TOKENIZER, HELLO))) as client:
        response = await client.post(CHAT, content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert response.status_code == 415 and error_of(response)["code"] == "unsupported_encoding"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/json; charset=utf-8", "nonsense"])
async def test_the_content_type_does_not_matter(content_type: str | None) -> None:
    async with in_process(front(TOKENIZER, say(TOKENIZER, HELLO))) as client:
        headers = {} if content_type is None else {"content-type": content_type}
        response = await client.post(CHAT, content=json.dumps(chat()).encode(), headers=headers)
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 400_000, 431),
        (b"GET /health HTTP/1.1\r\n" + b"X-A: 1\r\n" * 60_000, 431),
        (b"GET /" + b"x" * 400_000, 431),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x", 408),
    ],
    ids=["long header", "many headers", "long path", "nonsense", "slow"],
)
async def test_headers_are_bounded(request_bytes: bytes, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.server, "HEADER_TIMEOUT_S", 0.3)
    async with on_socket(front(TOKENIZER, say(TOKENIZER, HELLO))) as port:
        answer = await exchange(port, request_bytes)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
        assert (await exchange(port, b"GET /version HTTP/1.1\r\nConnection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")


MALFORMED = [
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999999999999999\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    b"POST /tokenize HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}\r\n",
    b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n{}",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /%ff%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET http:// HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.1\r\nX-\x00: 1\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: a\rb\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\x00" * 1000,
    b"\r\n" * 1000,
]


@pytest.mark.parametrize("request_bytes", MALFORMED, ids=range(len(MALFORMED)))
async def test_malformed_http_ends_one_connection_only(request_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.server, "HEADER_TIMEOUT_S", 0.3)
    async with on_socket(front(TOKENIZER, say(TOKENIZER, HELLO), Limits(body_timeout_s=0.3))) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_bytes)
        async with asyncio.timeout(5):
            answer = await reader.read(1 << 16)
        writer.close()
        assert answer[:10] in (b"", b"HTTP/1.1 4") or answer.startswith(b"HTTP/1.1 200"), answer
        assert (await exchange(port, b"GET /version HTTP/1.1\r\nConnection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")


async def test_silent_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.server, "HEADER_TIMEOUT_S", 0.1)
    async with on_socket(front(TOKENIZER, say(TOKENIZER, HELLO))) as port:
        assert await exchange(port, b"") == b""


async def test_connections_are_kept_for_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for headers is not the time between requests."""
    monkeypatch.setattr(router.server, "HEADER_TIMEOUT_S", 0.1)
    async with on_socket(front(TOKENIZER, say(TOKENIZER, HELLO))) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.2)
        writer.write(b"GET /version HTT")
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
        writer.close()


# The endpoints around generation


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/v1/models/", 400, "invalid_value"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("PUT", COMPLETIONS, 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/" + "x" * 5000, 404, "not_found"),
        ("GET", "/v1/models/" + "x" * 5000, 404, "model_not_found"),
    ],
)
async def test_wrong_paths_and_methods(method: str, path: str, status: int, code: str) -> None:
    async with in_process(front(TOKENIZER, say(TOKENIZER, HELLO))) as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code


async def test_health_asks_the_workers() -> None:
    answers: list[BaseException | None] = [None, WorkerLost("decode-0 is gone"), NoCapacity("loading", retry_after_s=4)]

    async def health() -> None:
        if (error := answers.pop(0)) is not None:
            raise error

    async with in_process(front(TOKENIZER, say(TOKENIZER, HELLO), health=health)) as client:
        assert (await client.get("/health")).status_code == 200
        lost, loading = await client.get("/health"), await client.get("/health")
    assert lost.status_code == loading.status_code == 503
    assert error_of(lost)["code"] == "worker_lost" and error_of(loading)["code"] == "no_capacity"
    assert loading.headers["retry-after"] == "4"


async def test_workers_that_hang_fail_health_and_spare_metrics() -> None:
    async def hang() -> Any:
        await asyncio.sleep(60)

    limits = Limits(health_timeout_s=0.05)
    served = front(TOKENIZER, say(TOKENIZER, HELLO), limits, health=hang, worker_metrics=hang)
    async with in_process(served) as client:
        assert (await client.get("/health")).status_code == 503
        assert "vllm:generation_tokens_total" in (await client.get("/metrics")).text


async def test_metrics_show_the_workers_too() -> None:
    async def pages() -> Sequence[str]:
        head = "# HELP vllm:num_requests_running x\n# TYPE vllm:num_requests_running gauge\n"
        return [f'{head}vllm:num_requests_running{{engine="{i}"}} {i}.0\n' for i in range(2)]

    async with in_process(front(TOKENIZER, say(TOKENIZER, HELLO), worker_metrics=pages)) as client:
        await client.post(CHAT, json=chat())
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert response.text.count("# TYPE vllm:num_requests_running") == 1
    assert response.text.count("\nvllm:num_requests_running{") == 2
    assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="baton-tiny"} 1.0' in response.text


async def test_version_and_tokens() -> None:
    async with in_process(front(TOKENIZER, say(TOKENIZER, HELLO), version="1.2.3")) as client:
        assert (await client.get("/version")).json() == {"version": "1.2.3"}
        ids = TOKENIZER.encode_now(HELLO, add_special_tokens=False)
        tokens = (await client.post("/tokenize", json={"model": MODEL, "prompt": HELLO})).json()
        assert tokens == {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids, "token_strs": None}
        spelled = await client.post("/tokenize", json={"prompt": "a b", "return_token_strs": True})
        assert "".join(spelled.json()["token_strs"]) == "aĠb"
        messages = (await client.post("/tokenize", json={"messages": chat()["messages"]})).json()["tokens"]
        assert TOKENIZER.decode(messages, False).endswith("<|im_start|>assistant\n")
        text = await client.post("/detokenize", json={"tokens": messages})
        assert text.json() == {"prompt": TOKENIZER.decode(messages, False)}
        assert (await client.post("/tokenize", json={"model": "other", "prompt": "x"})).status_code == 404


async def test_a_mistake_of_ours_ends_one_request_only(caplog: pytest.LogCaptureFixture) -> None:
    generator = say(TOKENIZER, HELLO)
    generator.fails = ZeroDivisionError("secret")  # type: ignore[assignment]
    for fails_at, status in ((0, 500), (2, 200)):
        generator.fails_at = fails_at
        async with in_process(front(TOKENIZER, generator)) as client:
            response = await client.post(CHAT, json=chat(stream=True))
        assert response.status_code == status
        assert "internal_error" in response.text and "secret" not in response.text and "[DONE]" not in response.text
    assert "ZeroDivisionError" in caplog.text


def test_json_text_is_compact() -> None:
    assert json_text({"a": ["é", None]}) == '{"a":["é",null]}'
