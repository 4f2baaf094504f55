"""Mutual TLS between services: the right roles serve a completion over TCP; everybody else is refused, and told why."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from certificates import Authority

from core.errors import ConfigError
from core.security.channels import Channels, add_port, make_server
from core.security.tls import MAY_CALL, ROLES, TlsFiles, may_call, role_of
from wire import handoff_pb2, handoff_pb2_grpc, session_pb2, session_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "baton-tiny"
TRIES = 5


# --- identities and the table --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (["spiffe://baton/role/router"], "router"),
        (["127.0.0.1", "spiffe://baton/role/decode", "worker.baton"], "decode"),
        ([], None),
        (["router"], None),
        (["spiffe://other/role/router"], None),
        (["spiffe://baton/role/root"], None),
        (["spiffe://baton/role/router/x"], None),
        (["SPIFFE://BATON/ROLE/ROUTER"], None),
        (["https://x/spiffe://baton/role/router"], None),
        (["spiffe://baton/role/router", "spiffe://baton/role/decode"], None),
    ],
)
def test_a_certificate_has_one_role_or_none(names: list[str], role: str | None) -> None:
    assert role_of(names) == role


def test_every_call_that_there_is_has_its_row() -> None:
    services = [session_pb2.DESCRIPTOR.services_by_name["Worker"], handoff_pb2.DESCRIPTOR.services_by_name["Handoff"]]
    calls = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert set(MAY_CALL) == calls


def test_who_may_ask_what() -> None:
    asked = {role: {method.rpartition("/")[2] for method in MAY_CALL if may_call(role, method)} for role in ROLES}
    assert asked == {
        "router": {"Tokens", "Events", "Health", "Metrics", "Paths"},
        "prefill": {"Session", "Health"},
        "decode": {"Session", "Health"},
        "aggregated": {"Health"},
        "doctor": {"Health", "Metrics", "Paths"},
    }
    assert not may_call(None, "/baton.session.v1.Worker/Health")
    assert not may_call("router", "/baton.session.v1.Worker/Unheard")


# --- one server, all kinds of callers ------------------------------------------------------------------------


class Answers(session_pb2_grpc.WorkerServicer, handoff_pb2_grpc.HandoffServicer):
    """Answers everything, and counts what reached it."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    async def Health(self, request: Any, context: Any) -> session_pb2.HealthReply:
        self.reached.append("Health")
        return session_pb2.HealthReply(loop_s=1.0)

    async def Events(self, request: Any, context: Any) -> AsyncIterator[session_pb2.Event]:
        self.reached.append("Events")
        yield session_pb2.Event()

    async def Tokens(self, request_iterator: Any, context: Any) -> AsyncIterator[session_pb2.FromWorker]:
        self.reached.append("Tokens")
        yield session_pb2.FromWorker()

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[handoff_pb2.ToSource]:
        self.reached.append("Session")
        yield handoff_pb2.ToSource()


async def health(channel: grpc.aio.Channel) -> str:
    return str((await session_pb2_grpc.WorkerStub(channel).Health(session_pb2.HealthRequest(), timeout=5)).loop_s)


async def events(channel: grpc.aio.Channel) -> str:
    async for _ in session_pb2_grpc.WorkerStub(channel).Events(session_pb2.EventsRequest(), timeout=5):
        return "an event"
    return "nothing"


async def tokens(channel: grpc.aio.Channel) -> str:
    async for _ in session_pb2_grpc.WorkerStub(channel).Tokens(iter([session_pb2.ToWorker()]), timeout=5):
        return "a token"
    return "nothing"


async def hand_over(channel: grpc.aio.Channel) -> str:
    async for _ in handoff_pb2_grpc.HandoffStub(channel).Session(iter([handoff_pb2.ToReceiver()]), timeout=5):
        return "an answer"
    return "nothing"


class Served:
    """A decode worker's server, without the worker."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder / "ours")
        self.stranger = Authority(folder / "theirs", "another authority")
        self.files = self.of("decode")
        self.answers = Answers()
        self.server = make_server((), self.files)
        session_pb2_grpc.add_WorkerServicer_to_server(self.answers, self.server)
        handoff_pb2_grpc.add_HandoffServicer_to_server(self.answers, self.server)
        self.address = f"127.0.0.1:{add_port(self.server, '127.0.0.1:0', self.files)}"

    def of(self, role: str, **how: Any) -> TlsFiles:
        certificate, key = self.authority.issue(role, **how)
        return TlsFiles(str(certificate), str(key), str(self.authority.certificate))

    async def ask(self, files: TlsFiles | None, call: Callable[[grpc.aio.Channel], Any] = health) -> str:
        async with Channels(files).open(self.address, (("grpc.use_local_subchannel_pool", 1),)) as channel:
            return str(await call(channel))

    async def refuses(self, files: TlsFiles | None, code: grpc.StatusCode, call: Any = health) -> str:
        """What the caller is told. Refused before its question is sent, gRPC's client at times says INTERNAL: again."""
        before = list(self.answers.reached)
        for _ in range(TRIES):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await self.ask(files, call)
            assert self.answers.reached == before, "it reached the method"
            if "SendMessageOperation" not in caught.value.debug_error_string():
                break
        assert caught.value.code() is code, caught.value
        return caught.value.details() or ""


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path)
    await served.server.start()
    yield served
    await served.server.stop(0.0)


UNAVAILABLE, DENIED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED


async def test_the_right_roles_are_answered(served: Served) -> None:
    assert await served.ask(served.of("router")) == "1.0"
    assert await served.ask(served.of("doctor")) == "1.0"
    assert await served.ask(served.of("router"), events) == "an event"
    assert await served.ask(served.of("router"), tokens) == "a token"
    assert await served.ask(served.of("prefill"), hand_over) == "an answer"
    assert await served.ask(served.of("decode"), hand_over) == "an answer"


@pytest.mark.parametrize(
    ("role", "call"),
    [
        ("decode", tokens), ("prefill", tokens), ("doctor", tokens), ("aggregated", tokens), ("doctor", events),
        ("prefill", events), ("router", hand_over), ("doctor", hand_over), ("aggregated", hand_over),
    ],
)  # fmt: skip
async def test_a_role_that_may_not_is_refused(
    served: Served, role: str, call: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert f"role {role} may not call" in await served.refuses(served.of(role), DENIED, call)
    assert any("refused" in line and f"role {role}" in line for line in caplog.messages)


async def test_a_certificate_of_ours_without_a_role_is_refused(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    files = served.of("router", file="odd", uri="spiffe://elsewhere/role/router")
    await served.refuses(files, DENIED)
    assert any("spiffe://elsewhere/role/router" in line for line in caplog.messages)


async def test_no_certificate(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    credentials = grpc.ssl_channel_credentials(served.authority.certificate.read_bytes())
    named = (("grpc.ssl_target_name_override", "worker.baton"),)
    async with grpc.aio.secure_channel(served.address, credentials, options=named) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(channel)
    assert caught.value.code() is UNAVAILABLE and served.answers.reached == []
    assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in capfd.readouterr().err


async def test_a_certificate_of_another_authority(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    certificate, key = served.stranger.issue("router")
    files = TlsFiles(str(certificate), str(key), str(served.authority.certificate))
    await served.refuses(files, UNAVAILABLE)
    assert "CERTIFICATE_VERIFY_FAILED" in capfd.readouterr().err


async def test_an_expired_certificate(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    await served.refuses(served.of("router", file="old", expired=True), UNAVAILABLE)
    assert "certificate has expired" in capfd.readouterr().err


async def test_plain_text_to_the_port(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    await served.refuses(None, UNAVAILABLE)
    assert "WRONG_VERSION_NUMBER" in capfd.readouterr().err


async def test_a_caller_that_does_not_know_the_servers_authority(served: Served) -> None:
    certificate, key = served.stranger.issue("router")
    files = TlsFiles(str(certificate), str(key), str(served.stranger.certificate))
    assert "CERTIFICATE_VERIFY_FAILED" in await served.refuses(files, UNAVAILABLE)


async def test_a_caller_that_reaches_somebody_who_is_no_worker(tmp_path: Path) -> None:
    """A router's certificate is of our authority as well: it must not be able to stand in for a worker."""
    served = Served(tmp_path)
    impostor = make_server((), served.files)
    session_pb2_grpc.add_WorkerServicer_to_server(served.answers, impostor)
    served.address = f"127.0.0.1:{add_port(impostor, '127.0.0.1:0', served.of('router'))}"
    await impostor.start()
    assert "Hostname Verification" in await served.refuses(served.of("prefill"), UNAVAILABLE)
    await impostor.stop(0.0)


async def test_over_a_unix_socket(tmp_path: Path) -> None:
    served = Served(tmp_path)
    served.address = f"unix:{tmp_path / 'socket'}"
    server = make_server((), served.files)
    session_pb2_grpc.add_WorkerServicer_to_server(served.answers, server)
    add_port(server, served.address, served.files)
    await server.start()
    assert await served.ask(served.of("router")) == "1.0"
    await served.refuses(None, UNAVAILABLE)
    await server.stop(0.0)


async def test_certificates_are_read_again_when_they_change(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """The whole authority is replaced under a running server: old certificates are refused from then on."""
    caplog.set_level("INFO")
    before = served.of("router", file="before")
    assert await served.ask(before) == "1.0"
    kept = served.authority.certificate.read_bytes()
    Path(served.files.certificate).write_text("half written")  # noqa: ASYNC240
    assert await served.ask(before) == "1.0", "what cannot be read changes nothing"
    assert any("stay as they were" in line for line in caplog.messages)
    served.authority = Authority(served.authority.folder)
    served.authority.issue("decode")
    assert served.authority.certificate.read_bytes() != kept
    assert await served.ask(served.of("router", file="after")) == "1.0"
    assert any("read the certificates again" in line for line in caplog.messages)
    certificate, key = Path(before.certificate), Path(before.key)
    with pytest.raises(grpc.aio.AioRpcError):
        await served.ask(TlsFiles(str(certificate), str(key), str(served.authority.certificate)))


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = map(str, authority.issue("router"))
    with pytest.raises(ConfigError, match=r"nowhere\.crt: No such file"):
        Channels(TlsFiles(str(tmp_path / "nowhere.crt"), key, str(authority.certificate)))
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="empty: no PEM file"):
        Channels(TlsFiles(certificate, str(tmp_path / "empty"), str(authority.certificate)))
