"""What the address of a registry says: which kind of Redis, where, as which user, with which certificates. Pure.

    redis://[user[:password]@]host[:port][/db]        rediss:// is the same with TLS, also before +sentinel and +cluster
    redis+sentinel://host:port,host:port/service      the sentinels; they name the server
    redis+cluster://host:port,host:port               some of the cluster's nodes
    unix:///path/of/socket

After `?`: ca, cert, key (files, PEM; a server's authority, and ours for a server that asks for one), db (of a Unix
socket, or behind sentinels), sentinel_auth=yes (user and password are shown to the sentinels too).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from core.errors import ConfigError

PORT = 6379  # where an address of one server names none
MAX_HOSTS = 64
FILES = ("ca", "cert", "key")


class Kind(Enum):
    ONE = "redis"
    UNIX = "unix"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class Address:
    """`place`: a socket's path, or the service that sentinels know. Files are '' where there are none."""

    kind: Kind
    hosts: tuple[tuple[str, int], ...] = ()
    place: str = ""
    db: int = 0
    user: str = ""
    password: str = ""
    tls: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""
    sentinel_auth: bool = False


def parse(url: str) -> Address:
    """Raises ConfigError, which never shows what stands before an @."""
    try:
        return _address(urlsplit(url))
    except _Wrong as error:
        reason = str(error)
    except ValueError:  # of the library: its text may show a password
        reason = "not an address"
    raise ConfigError(f"--registry: {reason}")


def _address(parts: SplitResult) -> Address:
    kind, tls = _kind(parts.scheme)
    asked = _asked(parts.query, kind, tls)
    user, password = _credentials(parts)
    hosts = parts.netloc.rpartition("@")[2]
    path = parts.path.strip("/")
    if parts.fragment:
        raise _Wrong("a # has to be percent-encoded")
    if kind is Kind.SENTINEL and not path:
        raise _Wrong("write redis+sentinel://host:port,host:port/service")
    if kind is Kind.UNIX and (hosts or not path):
        raise _Wrong("write unix:///path/of/socket")
    return Address(
        kind=kind,
        hosts=() if kind is Kind.UNIX else _hosts(hosts, kind),
        place=unquote(parts.path) if kind is Kind.UNIX else path if kind is Kind.SENTINEL else "",
        db=_db(path if kind in (Kind.ONE, Kind.CLUSTER) else asked.get("db", ""), kind),
        user=user,
        password=password,
        tls=tls,
        ca=asked.get("ca", ""),
        cert=asked.get("cert", ""),
        key=asked.get("key", ""),
        sentinel_auth=asked.get("sentinel_auth") == "yes",
    )


class _Wrong(ValueError):
    """Says what, without any part of the address that may be secret."""


def has_password(url: str) -> bool:
    return bool(_credentials(urlsplit(url))[1])


def with_password(url: str, password: str) -> str:
    """The same address with this password in place of its own; '' takes it out."""
    scheme, mark, rest = url.partition("://")
    netloc = urlsplit(url).netloc
    before, _, hosts = netloc.rpartition("@")
    user = before.partition(":")[0]
    shown = f"{user}:{quote(password, safe='')}@" if password else f"{user}@" if user else ""
    return f"{scheme}{mark}{shown}{hosts}{rest[len(netloc) :]}"


def _kind(scheme: str) -> tuple[Kind, bool]:
    if scheme == "unix":
        return Kind.UNIX, False
    protocol, _, kind = scheme.partition("+")
    known = {"": Kind.ONE, "sentinel": Kind.SENTINEL, "cluster": Kind.CLUSTER}
    if protocol not in ("redis", "rediss") or kind not in known:
        raise _Wrong("begin with redis://, rediss://, redis+sentinel://, redis+cluster:// or unix://")
    return known[kind], protocol == "rediss"


def _asked(query: str, kind: Kind, tls: bool) -> dict[str, str]:
    asked = dict(parse_qsl(query, keep_blank_values=True))
    allowed = {*(FILES if tls else ()), *({"db"} if kind is Kind.UNIX else ())}
    if kind is Kind.SENTINEL:
        allowed |= {"sentinel_auth", "db"}
    unknown = sorted(set(asked) - allowed)
    if set(unknown) & set(FILES):
        raise _Wrong(f"{unknown[0]} is for TLS: begin with rediss")
    if unknown:
        raise _Wrong(f"this kind of address has no {unknown[0]!r}")
    if asked.get("sentinel_auth", "yes") not in ("yes", "no"):
        raise _Wrong("sentinel_auth is yes or no")
    if bool(asked.get("cert")) != bool(asked.get("key")):
        raise _Wrong("cert and key belong together")
    return asked


def _credentials(parts: SplitResult) -> tuple[str, str]:
    """User and password. Either may be missing."""
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    return unquote(user), unquote(password)


def _hosts(listed: str, kind: Kind) -> tuple[tuple[str, int], ...]:
    found = []
    for item in listed.split(","):
        try:
            host = urlsplit(f"//{item}")
            port = host.port or (PORT if kind is Kind.ONE else 0)
            if not host.hostname or not port:
                raise ValueError("incomplete")
            found.append((host.hostname, port))
        except ValueError:
            raise _Wrong("write host:port; a password with /, # or ? in it has to be percent-encoded") from None
    if len(found) > MAX_HOSTS or (kind is Kind.ONE and len(found) > 1):
        raise _Wrong("too many hosts; several are for redis+sentinel and redis+cluster")
    return tuple(found)


def _db(text: str, kind: Kind) -> int:
    if not text:
        return 0
    if not text.isdecimal() or (kind is Kind.CLUSTER and int(text)):
        raise _Wrong("the database is a number, and always 0 in a cluster")
    return int(text)
