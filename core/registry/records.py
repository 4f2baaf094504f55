"""What a worker says of itself in the registry, and how it is written there: JSON with a version, checked when read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from enum import Enum

from core.messages import Role, WorkerId, WorkerInfo
from core.registry.store import MAX_VALUE_BYTES

VERSION = 1
MAX_LABELS = 16
MAX_TROUBLE = 300  # characters


class WorkerState(Enum):
    STARTING = "starting"  # alive; not yet to be used
    READY = "ready"
    DRAINING = "draining"  # finishes what it has; nothing new


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """`endpoint` is where routers open their sessions. `labels` are those of its place: zone, rack, node.

    `model` names config and tokenizer, which routers have as well; `trouble` says why it is still starting.
    """

    info: WorkerInfo
    endpoint: str
    state: WorkerState
    labels: dict[str, str] = field(default_factory=dict)
    model: str = ""
    trouble: str = ""

    @property
    def worker(self) -> WorkerId:
        return self.info.worker

    def encode(self) -> bytes:
        """At most MAX_VALUE_BYTES."""
        plain = {
            "version": VERSION,
            "info": asdict(self.info) | {"role": self.info.role.value},
            "endpoint": self.endpoint,
            "state": self.state.value,
            "labels": self.labels,
            "model": self.model,
            "trouble": self.trouble[:MAX_TROUBLE],
        }
        value = json.dumps(plain, separators=(",", ":")).encode()
        assert len(value) <= MAX_VALUE_BYTES and len(self.labels) <= MAX_LABELS, len(value)
        return value


def decode(value: bytes) -> WorkerRecord | None:
    """None for what this version cannot read: another version's record, or anything else that lies in the store."""
    if len(value) > MAX_VALUE_BYTES:
        return None
    try:
        plain = json.loads(value)
        if plain["version"] != VERSION:
            return None
        record = WorkerRecord(
            info=_info(plain["info"]),
            endpoint=_text(plain["endpoint"]),
            state=WorkerState(plain["state"]),
            labels={_text(name): _text(label) for name, label in plain["labels"].items()},
            model=_text(plain["model"]),
            trouble=_text(plain["trouble"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return record if len(record.labels) <= MAX_LABELS else None


def _info(plain: dict[str, object]) -> WorkerInfo:
    kinds = {item.name: item.type for item in fields(WorkerInfo)}
    worker = plain["worker"]
    if set(plain) != set(kinds) or not isinstance(worker, dict):
        raise ValueError("other fields")
    values: dict[str, object] = {name: _of_kind(plain[name], str(kinds[name])) for name in kinds}
    values["worker"] = WorkerId(_text(worker["name"]), _number(worker["incarnation"]))
    values["role"] = Role(plain["role"])
    return WorkerInfo(**values)  # type: ignore[arg-type]


def _of_kind(value: object, kind: str) -> object:
    return _text(value) if kind == "str" else _number(value) if kind == "int" else value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**64:
        raise ValueError(f"{value!r} is no number")
    return value
