"""What is not worth a line: a call that was cancelled. What is: every other failure."""

import asyncio
import io
import logging
import sys

import pytest

from baton.logs import set_up_logs


def fail_with(error: BaseException) -> None:
    try:
        raise error
    except BaseException:
        logging.getLogger("some.server").exception("Exception in a call")


def test_a_cancelled_call_is_no_news_and_a_failed_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger("asyncio"), "level", logging.WARNING)
    set_up_logs()
    fail_with(asyncio.CancelledError())
    assert said.getvalue() == ""
    fail_with(ValueError("wrong"))
    assert "some.server: Exception in a call" in said.getvalue() and "ValueError: wrong" in said.getvalue()
