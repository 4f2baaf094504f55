"""Several processes' metrics on one page: one HELP and TYPE per family, then every process's samples of it."""

from __future__ import annotations

from collections.abc import Iterable


def merge(texts: Iterable[bytes]) -> bytes:
    """Pages in the Prometheus text format, joined by family.

    Their series must differ in a label. Families are not parsed further: the text of a sample is passed on as it is.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}  # name -> its HELP and TYPE, its samples
    for text in texts:
        name = ""
        fresh = False
        for line in text.decode().splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                fresh = name not in families
                families.setdefault(name, ([], []))
            if line.startswith("#"):
                if fresh:
                    families[name][0].append(line)
            elif line and name:
                families[name][1].append(line)
    lines = [line for header, samples in families.values() for line in (*header, *samples)]
    return ("\n".join(lines) + "\n").encode() if lines else b""
