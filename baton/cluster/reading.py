"""Plain data into frozen dataclasses: unknown keys and wrong types are refused, with the path of the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from core.errors import ConfigError

T = TypeVar("T")

KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
MAX_ITEMS = 256


def read(kind: type[T], plain: object, path: str) -> T:
    """`plain` as a dataclass whose fields are texts, numbers, truth values, dicts of those, and such dataclasses.

    `path` is the name of the whole in messages; '' at the top. What a dataclass itself refuses is given its path.
    Raises ConfigError.
    """
    values = _mapping(plain, path)
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"{_at(path, name)}: there is no such key; {_nearest(name, list(known))}")
    missing = [n for n, f in known.items() if n not in values and f.default is f.default_factory is MISSING]
    if missing:
        raise ConfigError(f"{_at(path, missing[0])} is missing")
    read_values = {name: _value(hints[name], value, _at(path, name)) for name, value in values.items()}
    try:
        return kind(**read_values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}" if path else error.message) from None


def _value(kind: Any, value: object, path: str) -> Any:
    if is_dataclass(kind) and isinstance(kind, type):
        return read(kind, {} if value is None else value, path)
    if get_origin(kind) is not None:  # dict[str, ...] is the only one
        of = get_args(kind)[1]
        return {name: _value(of, item, _at(path, name)) for name, item in _mapping(value, path).items()}
    if kind is Any:
        return value
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and is_number:
        return float(value)  # type: ignore[arg-type]
    if not isinstance(value, kind) or (kind is int and not is_number):
        raise ConfigError(f"{path} must be {KINDS[kind]}, got {value!r}")
    return value


def _mapping(value: object, path: str) -> Mapping[str, object]:
    if value is None:  # a key with nothing behind it
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{path or 'the file'} must be keys with values, got {value!r}")
    if len(value) > MAX_ITEMS:
        raise ConfigError(f"{path or 'the file'} has {len(value)} keys, more than {MAX_ITEMS}")
    return value


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
