"""What is not worth a line: a call that was cancelled. What is: every other failure."""

import asyncio
import logging
from collections.abc import Iterator

import pytest

from baton.logs import set_up_logs


@pytest.fixture
def root(capsys: pytest.CaptureFixture[str]) -> Iterator[logging.Logger]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers.clear()
    set_up_logs()
    yield root
    root.handlers[:] = before
    root.setLevel(level)


def fail_with(error: BaseException) -> None:
    try:
        raise error
    except BaseException:
        logging.getLogger("some.server").exception("Exception in a call")


def test_a_cancelled_call_is_no_news_and_a_failed_one_is(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(asyncio.CancelledError())
    assert capsys.readouterr().err == ""
    fail_with(ValueError("wrong"))
    said = capsys.readouterr().err
    assert "some.server: Exception in a call" in said and "ValueError: wrong" in said
