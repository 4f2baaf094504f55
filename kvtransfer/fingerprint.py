"""May two workers hand pages to each other? Compared field by field when a session opens, before any byte moves."""

from __future__ import annotations

from dataclasses import dataclass, fields

from core.errors import FingerprintMismatch
from core.layout import PageLayout
from core.wire_version import MAJOR, MINOR


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`identity` covers weights, tokenizer and RoPE. Equal layouts move whole pages; others are refused for now."""

    identity: str
    layout: PageLayout
    digest: str  # id of the digest's algorithm
    wire_major: int = MAJOR
    wire_minor: int = MINOR


def check(mine: Fingerprint, theirs: Fingerprint) -> None:
    """Raise FingerprintMismatch, naming every field that differs, unless the two can hand over to each other."""
    wrong = [
        f"{name}: {getattr(mine, name)!r} here, {getattr(theirs, name)!r} there"
        for name in ("wire_major", "identity", "digest")
        if getattr(mine, name) != getattr(theirs, name)
    ]
    if abs(mine.wire_minor - theirs.wire_minor) > 1:
        wrong.append(f"wire_minor: {mine.wire_minor} here, {theirs.wire_minor} there, more than one apart")
    for field in fields(PageLayout):
        here, there = getattr(mine.layout, field.name), getattr(theirs.layout, field.name)
        if here != there:
            wrong.append(f"layout.{field.name}: {here!r} here, {there!r} there")
    if wrong:
        raise FingerprintMismatch("the workers cannot hand over to each other: " + "; ".join(wrong))
