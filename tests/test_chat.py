"""`baton chat`: a conversation keeps its history, survives an interrupted answer, and works in a pipe."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.fake_openai import FakeOpenAI, running


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with running(FakeOpenAI()) as server:
        yield server


def piped(server: FakeOpenAI, text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "baton", "chat", "--url", server.url, *flags]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)


def roles(body: dict) -> list[str]:
    return [message["role"] for message in body["messages"]]


def test_a_pipe_is_one_turn_a_line_with_the_history_sent_again(server: FakeOpenAI) -> None:
    done = piped(server, "hello\n\nand then?\n", "--system", "be brief", "--max-tokens", "9", "--temperature", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "one two three\none two three\n"
    first, second = server.seen
    assert roles(first) == ["system", "user"]
    assert roles(second) == ["system", "user", "assistant", "user"]
    assert second["messages"][2]["content"] == "one two three"
    assert (first["model"], first["max_completion_tokens"], first["temperature"]) == ("fake-model", 9, 0.0)


def test_reset_forgets_and_quit_leaves(server: FakeOpenAI) -> None:
    done = piped(server, "hello\n/reset\nhello again\n/what\n/quit\nnever said\n")
    assert done.returncode == 0
    assert [roles(body) for body in server.seen] == [["user"], ["user"]]
    assert "/reset forgets" in done.stdout


def test_a_failure_in_a_pipe_ends_it_with_the_reason(server: FakeOpenAI) -> None:
    server.refuse_every = 2
    done = piped(server, "hello\nagain\nnever said\n")
    assert (done.returncode, done.stderr) == (1, "baton chat: too busy\n")
    assert len(server.seen) == 2


@pytest.mark.parametrize(("attribute", "reason"), [("error_after", "a worker was lost"), ("break_after", "server is")])
def test_an_answer_that_is_cut_short_is_an_error(server: FakeOpenAI, attribute: str, reason: str) -> None:
    setattr(server, attribute, 2)
    done = piped(server, "hello\n")
    assert done.returncode == 1 and done.stdout.startswith("one two ") and reason in done.stderr


def test_no_server_is_a_clear_message() -> None:
    done = piped(FakeOpenAI(url="http://127.0.0.1:1"), "hello\n")
    assert done.returncode == 2 and "no server at http://127.0.0.1:1" in done.stderr


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, url: str) -> None:
        self._fd, child = pty.openpty()
        command = [sys.executable, "-m", "baton", "chat", "--url", url]
        self.process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, close_fds=True)
        os.close(child)
        os.set_blocking(self._fd, False)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str, count: int = 1, limit_s: float = 30.0) -> None:
        deadline_s = time.monotonic() + limit_s
        while self.shown.count(text) < count:
            assert time.monotonic() < deadline_s, self.shown
            try:
                self.shown += os.read(self._fd, 65536).decode()
            except BlockingIOError:
                time.sleep(0.01)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._fd)


@pytest.fixture
def terminal(server: FakeOpenAI) -> Iterator[Terminal]:
    terminal = Terminal(server.url)
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(server: FakeOpenAI, terminal: Terminal) -> None:
    terminal.wait_for("> ")
    server.words, server.gap_s = ("alpha ", "beta "), 30.0
    terminal.type("hello\n")
    terminal.wait_for("alpha ")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("[stopped]")
    server.words, server.gap_s = ("delta",), 0.0
    terminal.type("go on\n")
    terminal.wait_for("delta")
    assert roles(server.seen[1]) == ["user", "assistant", "user"]
    assert server.seen[1]["messages"][1]["content"] == "alpha "
    terminal.type("/quit\n")
    assert terminal.process.wait(10) == 0


def test_an_error_in_a_terminal_is_shown_and_the_chat_goes_on(server: FakeOpenAI, terminal: Terminal) -> None:
    server.refuse_every = 1
    terminal.wait_for("> ")
    terminal.type("hello\n")
    terminal.wait_for("[too busy]")
    server.refuse_every = 0
    terminal.type("hello\n")
    terminal.wait_for("one two three")
    assert roles(server.seen[1]) == ["user"]  # the turn that failed left no trace
    terminal.wait_for("> ", count=3)
    terminal.type("\x04")
    assert terminal.process.wait(10) == 0
