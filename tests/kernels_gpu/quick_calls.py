"""Calls of functions inside a kernel, at a fraction of their cost in Triton's interpreter.

The interpreter puts its own operations into `triton.language` when a kernel begins, and takes them out when it ends. It
puts the same ones in again at each call of a function inside, of which there are thousands: a third of all its time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest


def patch_once_per_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until `monkeypatch` is undone."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules: dict[Callable[..., Any], frozenset[str]] = {}  # by function: those that it knows the language by
    patched: set[frozenset[str]] = set()  # since the kernel began

    def known_to(function: Callable[..., Any]) -> frozenset[str]:
        known = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return frozenset(value.__name__ for value in known if value in (tl, tl.core))

    def patch_again(function: Callable[..., Any]) -> Any:
        known = modules.get(function)
        if known is None:
            known = modules[function] = known_to(function)
        if known in patched:
            return None  # whoever asks from inside a kernel undoes nothing
        patched.add(known)
        return patch(function)

    def launched(executor: Any, *given: Any, **named: Any) -> Any:
        patched.clear()
        return launch(executor, *given, **named)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_again)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
