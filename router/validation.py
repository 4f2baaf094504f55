"""Whether one JSON value is what its field takes: strict types, bounds, and an error that names the field.

Values are never echoed: an error is bounded by what we wrote, not by what was sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import NoReturn

from core.errors import ContextTooLong, InvalidRequest
from router.limits import ServedModel

INT64_MAX = 2**63 - 1
MAX_PLAIN_NODES = 256
MAX_PLAIN_DEPTH = 8
MAX_PLAIN_TEXT = 4096
SHOWN_NAME_CHARS = 64


def refuse(param: str, why: str) -> NoReturn:
    """Raises InvalidRequest for one field."""
    raise InvalidRequest(f"{param}: {why}", param=param)


def parse_object(body: bytes) -> Fields:
    """The JSON object in a request's body. Raises InvalidRequest."""
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # NaN, Infinity, or an integer of thousands of digits
        raise InvalidRequest("the body holds a number that cannot be read") from None
    if type(values) is not dict:
        raise InvalidRequest("the body must be a JSON object")
    return Fields(values)


def _no_constant(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


def clean_text(value: object, param: str, longest: int | None = None) -> str:
    """A string that is valid Unicode."""
    if type(value) is not str:
        refuse(param, "must be a string")
    if longest is not None and len(value) > longest:
        refuse(param, f"must have at most {longest} characters")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            refuse(param, "holds half of a surrogate pair, which is not valid Unicode")
    return value


def token_ids(value: object, param: str, model: ServedModel) -> tuple[int, ...]:
    """A list of ids of the vocabulary, within the context. Its length is looked at first: it may be in the millions."""
    if type(value) is not list:
        refuse(param, "must be a list of token ids")
    if len(value) > model.context_tokens:
        raise ContextTooLong(
            f"This model's maximum context length is {model.context_tokens} tokens. However, your {param} has "
            f"{len(value)} tokens. Please reduce its length.",
            param=param,
        )
    if any(type(item) is not int for item in value):
        refuse(param, "must hold integers only")
    if value and (min(value) < 0 or max(value) >= model.vocab_size):
        refuse(param, f"holds a token id outside 0 to {model.vocab_size - 1}")
    return tuple(value)


class Fields:
    """Typed reads of one JSON object. A field that is null counts as left out, as OpenAI's clients mean it."""

    def __init__(self, values: Mapping[str, object], path: str = "") -> None:
        self._values = values
        self._path = path

    def __iter__(self) -> Iterator[str]:
        return (name for name, value in self._values.items() if value is not None)

    def param(self, name: str) -> str:
        """The field's name for an error: a client's own names are cut, and may hold anything."""
        return self._path + name[:SHOWN_NAME_CHARS].encode("ascii", "backslashreplace").decode()

    def raw(self, name: str) -> object:
        return self._values.get(name)

    def integer(self, name: str, default: int, low: int = -INT64_MAX - 1, high: int = INT64_MAX) -> int:
        value = self._values.get(name)
        if value is None:
            return default
        if type(value) is not int:  # bool is a subclass of int, and no number here
            refuse(self.param(name), "must be an integer")
        if not low <= value <= high:
            refuse(self.param(name), f"must be between {low} and {high}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._values.get(name)
        if value is None:
            return default
        if type(value) is not int and type(value) is not float:
            refuse(self.param(name), "must be a number")
        if not -INT64_MAX <= value <= INT64_MAX or not math.isfinite(value):
            refuse(self.param(name), "is out of range")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._values.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            refuse(self.param(name), "must be true or false")
        return value

    def text(self, name: str, default: str = "", longest: int | None = None) -> str:
        value = self._values.get(name)
        return default if value is None else clean_text(value, self.param(name), longest)

    def items(self, name: str, longest: int) -> list[object]:
        """A list, empty when left out."""
        value = self._values.get(name)
        if value is None:
            return []
        if type(value) is not list:
            refuse(self.param(name), "must be a list")
        if len(value) > longest:
            refuse(self.param(name), f"must have at most {longest} items")
        return value

    def child(self, name: str) -> Fields | None:
        """A nested object."""
        value = self._values.get(name)
        if value is None:
            return None
        if type(value) is not dict:
            refuse(self.param(name), "must be an object")
        return Fields(value, f"{self.param(name)}.")

    def plain(self, name: str) -> dict[str, object]:
        """A nested object of bounded size, for a template to read."""
        value = self._values.get(name)
        if value is None:
            return {}
        if type(value) is not dict:
            refuse(self.param(name), "must be an object")
        _check_plain(value, self.param(name))
        return value


def _check_plain(root: object, param: str) -> None:
    """Walks without recursion: strings, numbers, flags, and lists and objects of them, all bounded."""
    pending = [(root, 0)]
    seen = 0
    while pending:
        value, depth = pending.pop()
        seen += 1
        if seen > MAX_PLAIN_NODES or depth > MAX_PLAIN_DEPTH:
            refuse(param, f"must have at most {MAX_PLAIN_NODES} values, nested at most {MAX_PLAIN_DEPTH} deep")
        if type(value) is str:
            clean_text(value, param, MAX_PLAIN_TEXT)
        elif (type(value) is int and abs(value) > INT64_MAX) or (type(value) is float and not math.isfinite(value)):
            refuse(param, "holds a number out of range")
        elif type(value) is list:
            pending += [(item, depth + 1) for item in value[: MAX_PLAIN_NODES + 1]]
        elif type(value) is dict:
            for key in value:
                clean_text(key, param, MAX_PLAIN_TEXT)
            pending += [(item, depth + 1) for item in value.values()]
