"""What keys and certificates a process has, from its flags; and that one started by hand is not open by accident."""

from __future__ import annotations

import logging
import secrets
import stat
from pathlib import Path
from typing import Protocol

from core.errors import ConfigError
from core.security.keys import MIN_KEY_BYTES, digest_key, read_keys
from core.security.tickets import Tickets
from core.security.tls import TlsFiles
from kvtransfer.digest import BLAKE3, Digest, keyed, plain

log = logging.getLogger(__name__)

KEY_FILE = "ticket-key"  # in the launcher's private folder
DIGESTS = ("xxh3-64", "blake3")


class Wish(Protocol):
    """What options of workers and routers have in common."""

    @property
    def ticket_key_file(self) -> str: ...
    @property
    def insecure(self) -> bool: ...
    @property
    def tls_cert(self) -> str: ...
    @property
    def tls_key(self) -> str: ...
    @property
    def tls_ca(self) -> str: ...


def keys_of(wish: Wish) -> tuple[bytes, ...]:
    """None of them only when that was asked for. Raises ConfigError."""
    if wish.ticket_key_file:
        path = Path(wish.ticket_key_file)
        try:
            text, mode = path.read_text(encoding="ascii"), path.stat().st_mode
        except OSError as error:
            raise ConfigError(f"--ticket-key-file {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"--ticket-key-file {path}: a key is written as hexadecimal digits") from None
        if mode & stat.S_IROTH:
            log.warning("%s can be read by everybody on this machine", path)
        return read_keys(text, f"--ticket-key-file {path}")
    if not wish.insecure:
        raise ConfigError(
            "--ticket-key-file is missing: write `openssl rand -hex 32` into a file that only this user reads, and give"
            " it to every worker and router; or add --insecure where nobody else can reach their ports"
        )
    return ()


def tickets_of(keys: tuple[bytes, ...]) -> Tickets | None:
    return Tickets(keys) if keys else None


def digest_of(name: str, keys: tuple[bytes, ...]) -> Digest:
    """Raises ConfigError: BLAKE3 takes its key from that of the tickets."""
    if name != BLAKE3:
        return plain()
    if not keys:
        raise ConfigError("--digest blake3 needs --ticket-key-file: its key comes from the one in there")
    return keyed(digest_key(keys[0]))


def tls_of(wish: Wish) -> TlsFiles | None:
    """Raises ConfigError when only some of the files are named."""
    named = {"--tls-cert": wish.tls_cert, "--tls-key": wish.tls_key, "--tls-ca": wish.tls_ca}
    missing = [flag for flag, path in named.items() if not path]
    if len(missing) == len(named):
        return None
    if missing:
        raise ConfigError(f"{' and '.join(missing)} missing: TLS takes all of {', '.join(named)}")
    return TlsFiles(wish.tls_cert, wish.tls_key, wish.tls_ca)


def tls_in(folder: str, role: str) -> TlsFiles:
    """The files of a service whose certificate lies in this folder under the name of its role; '': none."""
    if not folder:
        return TlsFiles("", "", "")
    at = Path(folder)
    return TlsFiles(str(at / f"{role}.crt"), str(at / f"{role}.key"), str(at / "ca.crt"))


def write_key(folder: Path) -> Path:
    """A fresh random key, for this folder's cluster alone."""
    path = folder / KEY_FILE
    path.touch(mode=0o600, exist_ok=False)
    path.write_text(secrets.token_hex(MIN_KEY_BYTES) + "\n", encoding="ascii")
    return path
