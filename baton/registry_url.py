"""Where the password of the registry comes from: a variable, a file that a variable names, or the address itself.

A command line can be read by every user of its machine, and ends in manifests and shell histories: a password belongs
into the environment. It is put into the address where the store is opened, and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from core.errors import ConfigError
from core.registry.address import has_password, parse, with_password

log = logging.getLogger(__name__)

PASSWORD = "BATON_REGISTRY_PASSWORD"  # noqa: S105  the name of the variable
PASSWORD_FILE = "BATON_REGISTRY_PASSWORD_FILE"  # noqa: S105
MAX_FILE_BYTES = 4096


def registry_url(flag: str, environ: Mapping[str, str]) -> str:
    """The address to open, with its password: never to be logged, or passed on. '' stays ''. Raises ConfigError."""
    if not flag:
        return ""
    parse(flag)  # what is wrong with it is said before anything is done with it
    if has_password(flag):
        log.warning("--registry shows its password to every user of this machine: put it into %s", PASSWORD)
        return flag
    password = password_in(environ)
    return with_password(flag, password) if password else flag


def password_in(environ: Mapping[str, str]) -> str:
    """Raises ConfigError when a file is named that is none."""
    if environ.get(PASSWORD):
        return environ[PASSWORD]
    if not environ.get(PASSWORD_FILE):
        return ""
    path = Path(environ[PASSWORD_FILE])
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_FILE_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{PASSWORD_FILE} {path}: {error}") from None
    if not text:
        raise ConfigError(f"{PASSWORD_FILE} {path}: the file is empty")
    return text


def for_children(flag: str) -> tuple[str, dict[str, str]]:
    """What a launcher gives its children: the address without its password, and the environment that has it."""
    if not flag or not has_password(flag):
        return flag, {}
    return with_password(flag, ""), {PASSWORD: parse(flag).password}
