"""How much one client may ask of the router, and what it serves: the front's configuration, resolved once."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Limits:
    """Every bound of the HTTP front. What goes over one is refused before it costs anything."""

    max_body_bytes: int = 4 * 2**20
    max_prompts: int = 16  # in one completions call; each is a request of its own
    max_choices: int = 8  # `n`
    max_messages: int = 2048
    max_requests: int = 1024  # admitted at once, over all clients; one with n choices counts n times
    max_queued_tokens: int = 2**20  # prompt tokens admitted whose first token has not come
    body_timeout_s: float = 30.0
    send_timeout_s: float = 30.0  # a client that reads nothing for so long has left
    deadline_s: float = 600.0
    health_timeout_s: float = 5.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model behind this router. Replies carry the name that the client used."""

    names: tuple[str, ...]
    context_tokens: int
    vocab_size: int  # of the model: ids of a prompt are below it
    created: int  # Unix seconds, for /v1/models
    defaults: SamplingParams = field(default_factory=SamplingParams)  # for fields that a client leaves out
    tenant_salt: bytes = b""  # at most 64 bytes: it keys the hash of a client's cache_salt

    def __post_init__(self) -> None:
        assert self.names, "a served model has a name"
        assert len(self.tenant_salt) <= 64, len(self.tenant_salt)
