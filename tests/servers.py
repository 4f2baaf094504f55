"""What a test needs from outside this project, and what becomes of it where that is absent: one place decides.

A developer's machine may lack servers: the test is skipped, with the reason. Where BATON_CI is set nothing may be
lacking: the test fails.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import NoReturn

import pytest

OTHER_NAMES = {"alertmanager": ("prometheus-alertmanager",)}  # as Debian calls the program
MODULES = frozenset({"ray", "redis", "kubernetes", "kmock", "rich"})


def need(name: str) -> str:
    """The path of a program, or the name of a Python package, that this test cannot do without."""
    found = _find(name)
    return lack(name) if found is None else found


def lack(what: str) -> NoReturn:
    """Ends the test: what it needs is not there."""
    if os.environ.get("BATON_CI"):
        pytest.fail(f"no {what} on this machine, and BATON_CI says that it is there", pytrace=False)
    pytest.skip(f"no {what} on this machine")


def _find(name: str) -> str | None:
    if name in MODULES:
        return name if importlib.util.find_spec(name) is not None else None
    return next((path for program in (name, *OTHER_NAMES.get(name, ())) if (path := shutil.which(program))), None)
