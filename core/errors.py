"""Every error that Baton raises, with the HTTP status and the gRPC code it becomes at the edge.

BatonError
├── RequestError                 the client's request is at fault
│   ├── InvalidRequest           400  INVALID_ARGUMENT     a field is wrong; `param` names it
│   │   └── ContextTooLong       400  OUT_OF_RANGE         prompt and max_tokens exceed the context
│   ├── ModelNotFound            404  NOT_FOUND
│   ├── BodyTooSlow              408  DEADLINE_EXCEEDED
│   ├── BodyTooLarge             413  RESOURCE_EXHAUSTED
│   ├── UnsupportedEncoding      415  INVALID_ARGUMENT     a compressed body
│   └── PoisonRequest            500  FAILED_PRECONDITION  has cost two workers; never retried
├── Overloaded                   the client may come back after `retry_after_s`
│   ├── QueueFull                429  RESOURCE_EXHAUSTED
│   └── NoCapacity               503  UNAVAILABLE
├── RegistryAway                 503  UNAVAILABLE          shared state cannot be reached; serving goes on without
├── Cancelled                    499  CANCELLED            the client left
├── DeadlineExceeded             504  DEADLINE_EXCEEDED
├── WorkerError                  the router may try another worker
│   ├── WorkerLost               503  UNAVAILABLE
│   ├── WorkerDraining           503  UNAVAILABLE          takes nothing new; the attempt has not begun there
│   └── EngineError              500  INTERNAL             a step failed; the error of its requests
├── HandoffError                 a page could not be moved; computed again, never guessed
│   ├── OutOfBounds              500  OUT_OF_RANGE         an index outside the pool
│   ├── StalePage                500  ABORTED              the page's epoch has moved on
│   ├── PlaceMismatch            500  DATA_LOSS            not the page of this place in the prompt
│   ├── DigestMismatch           500  DATA_LOSS            the bytes are not those that were written
│   ├── PeerLost                 500  UNAVAILABLE          the other worker is gone
│   ├── BadTicket                500  PERMISSION_DENIED    not what the router has permitted; nothing was served
│   └── FingerprintMismatch      500  FAILED_PRECONDITION  the two workers do not run the same model
└── StartupError                 the process stops before it serves, with `exit_code`
    ├── ConfigError              exit 2   a flag, variable or file is wrong
    ├── CheckpointError          exit 3   missing, broken or unknown checkpoint
    ├── TooLittleMemory          exit 4   no room for one sequence
    └── PortInUse                exit 5
"""

from __future__ import annotations

from typing import ClassVar


class BatonError(Exception):
    """The root. `http_status` and `grpc_code` say what it becomes at an edge, `code` what clients match on."""

    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"
    code: ClassVar[str] = "internal_error"
    error_type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class RequestError(BatonError):
    http_status = 400
    grpc_code = "INVALID_ARGUMENT"
    code = "invalid_request"
    error_type = "invalid_request_error"


class InvalidRequest(RequestError):
    code = "invalid_value"


class ContextTooLong(InvalidRequest):
    grpc_code = "OUT_OF_RANGE"
    code = "context_length_exceeded"


class ModelNotFound(RequestError):
    http_status = 404
    grpc_code = "NOT_FOUND"
    code = "model_not_found"


class BodyTooSlow(RequestError):
    http_status = 408
    grpc_code = "DEADLINE_EXCEEDED"
    code = "body_too_slow"


class BodyTooLarge(RequestError):
    http_status = 413
    grpc_code = "RESOURCE_EXHAUSTED"
    code = "body_too_large"


class UnsupportedEncoding(RequestError):
    http_status = 415
    code = "unsupported_encoding"


class PoisonRequest(RequestError):
    http_status = 500
    grpc_code = "FAILED_PRECONDITION"
    code = "poison_request"


class Overloaded(BatonError):
    http_status = 503
    grpc_code = "UNAVAILABLE"
    code = "overloaded"
    error_type = "overloaded_error"


class QueueFull(Overloaded):
    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"
    code = "rate_limit_exceeded"
    error_type = "rate_limit_error"


class NoCapacity(Overloaded):
    code = "no_capacity"


class RegistryAway(BatonError):
    http_status = 503
    grpc_code = "UNAVAILABLE"
    code = "registry_away"


class Cancelled(BatonError):
    http_status = 499
    grpc_code = "CANCELLED"
    code = "cancelled"


class DeadlineExceeded(BatonError):
    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"
    code = "deadline_exceeded"


class WorkerError(BatonError):
    code = "worker_error"


class WorkerLost(WorkerError):
    http_status = 503
    grpc_code = "UNAVAILABLE"
    code = "worker_lost"


class WorkerDraining(WorkerError):
    http_status = 503
    grpc_code = "UNAVAILABLE"
    code = "worker_draining"


class EngineError(WorkerError):
    code = "engine_error"


class HandoffError(BatonError):
    code = "handoff_failed"


class OutOfBounds(HandoffError):
    grpc_code = "OUT_OF_RANGE"
    code = "out_of_bounds"


class StalePage(HandoffError):
    grpc_code = "ABORTED"
    code = "stale_page"


class PlaceMismatch(HandoffError):
    grpc_code = "DATA_LOSS"
    code = "place_mismatch"


class DigestMismatch(HandoffError):
    grpc_code = "DATA_LOSS"
    code = "digest_mismatch"


class PeerLost(HandoffError):
    grpc_code = "UNAVAILABLE"
    code = "peer_lost"


class BadTicket(HandoffError):
    grpc_code = "PERMISSION_DENIED"
    code = "bad_ticket"


class FingerprintMismatch(HandoffError):
    grpc_code = "FAILED_PRECONDITION"
    code = "fingerprint_mismatch"


class StartupError(BatonError):
    exit_code: ClassVar[int] = 1
    code = "startup_error"


class ConfigError(StartupError):
    exit_code = 2
    code = "config_error"


class CheckpointError(StartupError):
    exit_code = 3
    code = "checkpoint_error"


class TooLittleMemory(StartupError):
    exit_code = 4
    code = "too_little_memory"


class PortInUse(StartupError):
    exit_code = 5
    code = "port_in_use"


def leaves(root: type[BatonError] = BatonError) -> dict[str, type[BatonError]]:
    """Every error class by its `code`: how an error that crossed a process is raised again as itself."""
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(leaves(child))
    return found
