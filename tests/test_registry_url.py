"""Addresses of the registry: what they mean, what is wrong with them, and that a password is never shown."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from baton.options import RouterOptions, to_flags
from baton.registry_url import PASSWORD, PASSWORD_FILE, for_children, registry_url
from core.errors import ConfigError
from core.registry.address import Address, Kind, has_password, parse, with_password

SECRET = "s3cr:t/@#?%"
QUOTED = "s3cr%3At%2F%40%23%3F%25"


@pytest.mark.parametrize(
    "url,address",
    [
        ("redis://host", Address(Kind.ONE, (("host", 6379),))),
        ("redis://host:1/3", Address(Kind.ONE, (("host", 1),), db=3)),
        ("redis://[::1]:7", Address(Kind.ONE, (("::1", 7),))),
        ("redis://me@host", Address(Kind.ONE, (("host", 6379),), user="me")),
        (f"redis://me:{QUOTED}@host", Address(Kind.ONE, (("host", 6379),), user="me", password=SECRET)),
        (
            "rediss://host?ca=/a.crt&cert=/c.crt&key=/c.key",
            Address(Kind.ONE, (("host", 6379),), tls=True, ca="/a.crt", cert="/c.crt", key="/c.key"),
        ),
        ("unix:///run/redis.sock", Address(Kind.UNIX, place="/run/redis.sock")),
        ("unix://:pw@/run/redis.sock?db=2", Address(Kind.UNIX, place="/run/redis.sock", db=2, password="pw")),
        (
            "redis+sentinel://:pw@a:1,b:2/main?db=1&sentinel_auth=yes",
            Address(Kind.SENTINEL, (("a", 1), ("b", 2)), "main", 1, password="pw", sentinel_auth=True),
        ),
        ("rediss+sentinel://a:1/main", Address(Kind.SENTINEL, (("a", 1),), "main", tls=True)),
        ("redis+cluster://a:1,b:2", Address(Kind.CLUSTER, (("a", 1), ("b", 2)))),
        ("rediss+cluster://a:1/0", Address(Kind.CLUSTER, (("a", 1),), tls=True)),
    ],
)
def test_an_address_is_read(url: str, address: Address) -> None:
    assert parse(url) == address
    assert parse(with_password(url, SECRET)).password == SECRET
    assert parse(with_password(with_password(url, SECRET), "")).password == ""
    if not address.password:
        assert with_password(with_password(url, SECRET), "") == url == with_password(url, "")


@pytest.mark.parametrize(
    "url,says",
    [
        ("host:6379", "begin with"),
        ("http://:hush@host", "begin with"),
        ("hush", "begin with"),
        ("redis://", "host:port"),
        ("redis://:hush@host:port", "host:port"),
        ("redis://:hush/hush@host", "percent-encoded"),
        ("redis://:hush#hush@host", "percent-encoded"),
        ("redis://:hush@[::1", "not an address"),
        ("redis://:hush@host/name", "number"),
        ("redis://:hush@a:1,b:2", "several"),
        ("redis+cluster://:hush@a:1/2", "always 0"),
        ("redis+cluster://a", "host:port"),
        ("redis+sentinel://:hush@a:1", "/service"),
        ("redis+sentinel://:hush@a/main", "host:port"),
        ("redis+sentinel://:hush@a:1/main?sentinel_auth=hush", "yes or no"),
        ("unix://:hush@host/path", "unix:///"),
        ("unix://", "unix:///"),
        ("redis://:hush@host?ca=/x", "rediss"),
        ("rediss://:hush@host?cert=/x", "belong together"),
        ("redis://:hush@host?ssl_cert_reqs=none", "ssl_cert_reqs"),
    ],
)
def test_what_is_wrong_with_an_address_is_said_without_its_password(url: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(url)
    assert says in error.value.message and "hush" not in error.value.message
    assert error.value.__cause__ is None


def test_the_password_comes_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n")
    url = "redis://me@host:1/2"
    assert registry_url("", {PASSWORD: SECRET}) == ""
    assert registry_url(url, {}) == url == registry_url(url, {PASSWORD: "", PASSWORD_FILE: ""})
    for environ in ({PASSWORD: SECRET, PASSWORD_FILE: "/nowhere"}, {PASSWORD_FILE: str(file)}):
        assert parse(registry_url(url, environ)) == Address(Kind.ONE, (("host", 1),), db=2, user="me", password=SECRET)
    file.write_text("\n")
    for path in (str(file), str(tmp_path / "none")):
        with pytest.raises(ConfigError, match=PASSWORD_FILE):
            registry_url(url, {PASSWORD_FILE: path})
    with pytest.raises(ConfigError, match="begin with"):
        registry_url("host", {PASSWORD: SECRET})


def test_a_password_in_the_address_stands_and_is_warned_of_without_being_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = f"redis://:{QUOTED}@host"
    with caplog.at_level(logging.DEBUG):
        assert registry_url(url, {PASSWORD: "other"}) == url
    assert PASSWORD in caplog.text and QUOTED not in caplog.text and SECRET not in caplog.text


def test_children_get_the_password_by_their_environment_alone() -> None:
    url, env = for_children(f"redis://me:{QUOTED}@host:1/2")
    assert (url, env) == ("redis://me@host:1/2", {PASSWORD: SECRET}) and not has_password(url)
    assert parse(registry_url(url, env)).password == SECRET
    flags = to_flags(RouterOptions(model="m", registry=url))
    assert "--registry=redis://me@host:1/2" in flags and not any(QUOTED in flag for flag in flags)
    assert for_children("") == ("", {}) and for_children("redis://host") == ("redis://host", {})
